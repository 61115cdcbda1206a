"""Fine-tuning recipes: config in, PEFT checkpoint out.

from lorakit.recipes import FinetuneConfig
from lorakit.recipes.finetune import finetune

folder = finetune(FinetuneConfig(output_dir="runs/sql", task="text_to_sql"))
"""

from .config import FinetuneConfig

__all__ = ["FinetuneConfig"]
