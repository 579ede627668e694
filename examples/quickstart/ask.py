"""Ask an exported Hugging Face model one question, greedily: `ask.py DIR '8+7+6+5+9='`."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, question: str) -> None:
    """Print the model's answer to `question`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=128)
    print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: ask.py DIR QUESTION")
    main(*sys.argv[1:])
