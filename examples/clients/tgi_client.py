"""Hugging Face's own client before our TGI API: python examples/clients/tgi_client.py [URL] [PROMPT].

Begin the services with `fusionroute up --lab`, which says where HTTP is.
"""

import sys

from huggingface_hub import InferenceClient

url, prompt = (*sys.argv[1:], *("http://127.0.0.1:8080", "box: 4+4; rev jbef=")[len(sys.argv) - 1 :])
client = InferenceClient(url)
print(client.text_generation(prompt, max_new_tokens=32))
for event in client.text_generation(prompt, max_new_tokens=32, stream=True, details=True):
    if not event.token.special:
        print(event.token.text, end="", flush=True)
print()
