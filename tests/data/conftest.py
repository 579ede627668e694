from byte_tokenizer import make_tokenizer, tokenizer, write_jsonl  # noqa: F401
