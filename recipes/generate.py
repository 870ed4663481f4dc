"""Has a model write: `lq-generate source=<folder or hub name> prompt="..."`, with `adapter=<folder>` if there is one.

Each prompt is a question in the model's chat template; template=none continues it as a text. All prompts are written
at once, with a KV cache, and tokens per second are printed.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from lq_plugin.recipes.launch.console import quieten
from lq_plugin.recipes.launch.settings import check_settings, hints_on_exit
from lq_plugin.recipes.tasks.finetuned import Finetuned
from lq_plugin.recipes.tasks.writing import Sampling, write

MODEL_KEYS = ("source", "adapter", "linear", "skip", "dtype", "device", "template")
KEYS = (*MODEL_KEYS, "prompt", "length", "temperature", "top_k", "top_p", "seed", "output")


@hydra.main(version_base="1.3", config_path="pkg://lq_plugin.conf", config_name="generate")
def generate(config: DictConfig) -> None:
    quieten()
    check_settings(config, KEYS)
    prompts = [config.prompt] if isinstance(config.prompt, str) else list(config.prompt)
    sampling = Sampling(config.length, config.temperature, config.top_k, config.top_p, config.seed)
    continues = config.template == "none"
    settings = {**{key: config[key] for key in MODEL_KEYS}, "template": "plain" if continues else config.template}
    model, encoder = Finetuned(**settings).load()
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    tokens = [encoder.text_prompt(prompt) for prompt in prompts] if continues else [encoder.prompt(c) for c in chats]
    written = write(model, encoder.tokenizer, tokens, sampling)
    texts = [encoder.tokenizer.decode(each, skip_special_tokens=True) for each in written.tokens]
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{prompt}\n\n{text}\n")
    print(
        f"{sum(map(len, written.tokens))} tokens in {written.seconds:.2f} s: {written.tokens_per_second:.1f} tokens/s"
    )
    if config.output is not None:
        Path(config.output).write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def main() -> None:
    with hints_on_exit(KEYS):
        generate()


if __name__ == "__main__":
    main()
