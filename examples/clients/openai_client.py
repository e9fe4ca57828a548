"""OpenAI's own client before our API: pip install openai; python examples/clients/openai_client.py [URL] [PROMPT].

Begin the services with `fusionroute up --lab`, which says where HTTP is.
"""

import sys

from openai import OpenAI

url, prompt = (*sys.argv[1:], *("http://127.0.0.1:8080", "box: 4+4; rev jbef=")[len(sys.argv) - 1 :])
client = OpenAI(base_url=f"{url}/v1", api_key="EMPTY")
print(
    client.completions.create(model="fusionroute", prompt=prompt, max_tokens=32, temperature=0)
    .choices[0]
    .text
)
messages = [{"role": "user", "content": prompt}]
for chunk in client.chat.completions.create(
    model="fusionroute", messages=messages, max_tokens=32, stream=True
):
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
print()
