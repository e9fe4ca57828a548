"""Who is asked: experts, fused rules, selections, merged and fine-tuned models, other servers."""
