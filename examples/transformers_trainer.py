"""The Trainer of transformers, with a small GPT-2: python examples/transformers_trainer.py"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from characters import Characters
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from mada_optim import MADA, OMADA
from mada_optim.integrations.transformers import LogCoefficients, OMADATrainer


def collate(windows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    inputs = torch.stack([inputs for inputs, _ in windows])
    return {"input_ids": inputs, "labels": inputs}


def main(argv: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, help="a text file")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/transformers"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--all-decay", action="store_true", help="weight decay for biases and norms, too")
    parser.add_argument("--omada", action="store_true", help="OMADA in place of MADA")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args(argv)

    set_seed(0)
    data = Characters(args.data)
    size = {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2}
    config = GPT2Config(vocab_size=len(data.vocabulary), bos_token_id=None, eos_token_id=None, use_cache=False, **size)
    model = GPT2LMHeadModel(config)

    # --8<-- [start:trainer]
    trainer_class = Trainer
    if args.omada:
        # OMADA must know which weights are matrices, which this Trainer tells it.
        trainer_class = OMADATrainer
        optimizer = {"optimizer_cls_and_kwargs": (OMADA, {"lr": 3e-3})}
    elif args.all_decay:
        optimizer = {"optimizers": (MADA(model.parameters(), lr=3e-3, weight_decay=0.1), None)}
    else:
        # The Trainer makes the parameter groups: no weight decay for biases and norms.
        optimizer = {"optimizer_cls_and_kwargs": (MADA, {"lr": 3e-3, "betas": (0.9, 0.99)})}
    trainer = trainer_class(
        model,
        TrainingArguments(
            output_dir=args.out,
            max_steps=args.steps,
            lr_scheduler_type="cosine",
            weight_decay=0.1,
            logging_steps=args.log_every,
            save_steps=args.steps // 2,
            report_to="tensorboard",
            use_cpu=args.cpu,
        ),
        train_dataset=data,
        data_collator=collate,
        **optimizer,
    )
    trainer.add_callback(LogCoefficients(trainer))
    trainer.train(resume_from_checkpoint=args.resume)
    # --8<-- [end:trainer]

    print(trainer.state.log_history[-1])
    return trainer


if __name__ == "__main__":
    main()
