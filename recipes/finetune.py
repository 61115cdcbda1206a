"""The recipe: fine-tune a LoRA adapter with PEFT and TRL's SFTTrainer.

Read it top to bottom: load the base, say which modules get an adapter, hand rows and settings to the trainer, save.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import embedded
from lorakit.errors import BaseModelNotFoundError, ConfigError, MissingDependencyError

from .config import FinetuneConfig
from .data import training_rows
from .loss_plot import save_loss_plot
from .run_folder import RunFolder

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTConfig, SFTTrainer


def finetune(config: FinetuneConfig, *, progress: bool = True) -> Path:
    """Fine-tunes one adapter.

    The loss counts the completion's tokens alone. A finished run with the same settings is returned as it is; an
    interrupted one goes on from its last checkpoint, and then ends with the weights of a run without a break
    (bit for bit on a CPU with the same number of threads).

    Args:
        config: The settings.
        progress: Show a progress bar with the loss.

    Returns:
        `config.output_dir`, a PEFT checkpoint: `adapter_config.json` and `adapter_model.safetensors` (float32), with
        `recipe.yaml` (settings and results) and `loss.png` beside it.

    Raises:
        ConfigError: The settings do not fit the data, the base or what lies in `output_dir`.
        BaseModelNotFoundError: The base cannot be found.
        MissingDependencyError: A package that the settings need is not installed.
    """
    folder = RunFolder(config.output_dir)
    if folder.is_finished(config):
        return folder.path

    rows = training_rows(config)
    _check_dependencies(config)
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    model, tokenizer = load_base(config, device, dtype)
    _check_lengths(rows, tokenizer, config.max_length)
    adapter = lora_config(config, model, device)
    # All that can be wrong is known by now; from here on the folder changes.
    checkpoint = folder.start(config)

    from transformers.trainer_callback import PrinterCallback

    trainer = trainer_class(model, device)(
        model=model,
        args=trainer_config(config, folder, device, dtype),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[_progress_bar()] if progress else None,
    )
    trainer.remove_callback(PrinterCallback)  # it prints every log entry; the bar shows the loss
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.monotonic() - started

    trainer.model.save_pretrained(folder.path)
    history = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    steps, losses = [step for step, _ in history], [loss for _, loss in history]
    save_loss_plot(steps, losses, folder.loss_plot, title=config.task or str(config.train_file))
    results = {"steps": trainer.state.global_step, "seconds": round(seconds, 1), "device": device}
    folder.finish(config, results | ({"final_loss": float(losses[-1])} if losses else {}))
    return folder.path


def resolve_device(config: FinetuneConfig) -> str:
    """`"cuda"` or `"cpu"`.

    Raises:
        ConfigError: The config asks for a GPU and there is none.
    """
    import torch

    available = torch.cuda.is_available()
    if (config.device == "cuda" or config.use_qlora) and not available:
        key = "use_qlora is true" if config.use_qlora else "device is 'cuda'"
        raise ConfigError(f"{key}, but torch sees no GPU: set device to 'auto' and use_qlora to false.")
    return "cuda" if available and config.device != "cpu" else "cpu"


def resolve_dtype(config: FinetuneConfig, device: str) -> "torch.dtype":
    """The base's dtype: bfloat16 where a GPU computes in it, float32 on a CPU, unless the config says otherwise."""
    import torch

    if config.dtype == "auto":
        return torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def load_base(
    config: FinetuneConfig, device: str, dtype: "torch.dtype"
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The base model and its tokenizer.

    Raises:
        BaseModelNotFoundError: The base is no local folder and the Hub does not have it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(embedded.model_path()) if config.base_model == embedded.MODEL_ID else config.base_model
    options: dict[str, Any] = {"dtype": dtype}
    if config.use_qlora:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        options["device_map"] = {"": 0}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise BaseModelNotFoundError(
            f"base_model {config.base_model!r} cannot be loaded: {error}. Give a Hub id or a local folder."
        ) from error
    if not embedded.is_dequantised(Path(path)):
        # What adapter_config.json will name as the base: the id as given, not a folder of the Hub's cache. The
        # dequantised copy keeps its folder, since the id would name other weights.
        model.name_or_path = config.base_model
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        raise ConfigError(f"base_model {config.base_model!r} has no chat template: use an instruction-tuned model.")
    return model, tokenizer


def lora_config(config: FinetuneConfig, model: "PreTrainedModel", device: str) -> "LoraConfig":
    """PEFT's config for the settings.

    Raises:
        ConfigError: More layers asked for than the base has, or target modules that it does not have.
    """
    from peft import LoraConfig

    targets = config.target_modules
    if not isinstance(targets, str):
        names = [name for name, _ in model.named_modules()]
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise ConfigError(f"target_modules names {target!r}, which the base does not have.")
    count = model.config.get_text_config().num_hidden_layers
    layers = config.layers
    if layers == "auto":
        # On a CPU the backward pass is what costs: it ends where the last adapter is.
        layers = max(1, round(count / 3)) if device == "cpu" else "all"
    if isinstance(layers, int) and layers > count:
        raise ConfigError(f"layers is {layers}, but the base has {count}: give at most that, or 'all'.")
    if targets == "all-linear" and isinstance(layers, int):
        targets = _linear_names(model)  # PEFT takes a choice of layers only with a list of names
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        # PEFT's field is an int by its annotation only; a whole number is passed as one so that it is saved as one.
        lora_alpha=int(config.alpha) if config.alpha.is_integer() else config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        layers_to_transform=list(range(count - layers, count)) if isinstance(layers, int) else None,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
    )


def trainer_class(model: "PreTrainedModel", device: str) -> "type[SFTTrainer]":
    """TRL's SFTTrainer; on a CPU with the head applied to the completions' positions alone.

    TRL 1.16 does that on a GPU only: elsewhere its fused head scores every position of the vocabulary, twice, which
    takes longer than the rest of a small model. The loss is the same.
    """
    import inspect

    import torch
    from trl import SFTTrainer

    if device != "cpu" or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return SFTTrainer

    class CompletionHeadTrainer(SFTTrainer):
        """SFTTrainer that asks the model for logits only where a label follows."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs["labels"][:, 1:]
            positions = (labels != -100).any(dim=0).nonzero().squeeze(1)
            features = {key: value for key, value in inputs.items() if key != "labels"}
            outputs = model(**features, use_cache=False, logits_to_keep=positions)
            targets = labels[:, positions].flatten()
            total = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1).float(), targets, reduction="sum")
            count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = total / torch.as_tensor(count).clamp(min=1)
            return (loss, outputs) if return_outputs else loss

    return CompletionHeadTrainer


def _linear_names(model: "PreTrainedModel") -> list[str]:
    """Last names of all Linear modules but the head: what PEFT means by "all-linear"."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        }
    )


def trainer_config(config: FinetuneConfig, folder: RunFolder, device: str, dtype: "torch.dtype") -> "SFTConfig":
    """TRL's config for the settings."""
    import torch
    from trl import SFTConfig

    # transformers 5.2x renames the switch; TRL turns it on unless told otherwise.
    checkpointing = "activation_checkpointing"
    if checkpointing not in SFTConfig.__dataclass_fields__:
        checkpointing = "gradient_checkpointing"
    return SFTConfig(
        **{checkpointing: config.gradient_checkpointing},
        output_dir=str(folder.checkpoints),
        max_length=None,  # lengths were checked; nothing is cut
        completion_only_loss=True,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_ratio,  # transformers reads a value below 1 as a share
        weight_decay=config.weight_decay,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=device == "cpu",
        bf16=device == "cuda" and dtype == torch.bfloat16,
        dataloader_pin_memory=device == "cuda",
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=1,
        logging_steps=config.logging_steps,
        report_to="none",
        disable_tqdm=True,  # finetune shows its own bar
    )


def _check_dependencies(config: FinetuneConfig) -> None:
    import importlib.util

    needed = ["trl", "peft", "datasets", "matplotlib"] + (["bitsandbytes"] if config.use_qlora else [])
    for package in needed:
        if importlib.util.find_spec(package) is None:
            reason = "use_qlora needs" if package == "bitsandbytes" else "Fine-tuning needs"
            raise MissingDependencyError(f"{reason} the package {package}: pip install {package}")


def _check_lengths(rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", max_length: int) -> None:
    for number, row in enumerate(rows, start=1):
        # Rendered first: transformers' return type of a tokenising call differs between versions.
        text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if length > max_length:
            raise ConfigError(
                f"Row {number} has {length} tokens, above max_length {max_length}: raise it or drop the row."
            )


def _progress_bar() -> "TrainerCallback":
    from tqdm.auto import tqdm
    from transformers import TrainerCallback

    class ProgressBar(TrainerCallback):
        """One bar over the optimizer steps, with the latest loss."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

    return ProgressBar()
