"""Train the reference model from nothing: `python -m prune_edit.reference_model.train --out DIR`.

Plain training of a stock Llama: AdamW, cosine schedule, cross-entropy on the answers (on all of a
story); no dropout, no sparsity, nothing that knows about pruning. Resumes from `DIR/resume.pt`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prune_edit.reference_model.corpus import STAGES, STEREOTYPE_SKEW, Corpus, Text
from prune_edit.reference_model.tokenizer import build_tokenizer
from prune_edit.tasks import arithmetic, gender, skills
from prune_edit.tasks.task import Task

STEPS = 5000
PEAK_LEARNING_RATE = 2e-3
WARMUP = 200
COSINE_STEPS = 6000
COOLDOWN = 2000  # until here a slow cosine; then straight lines, level between these two steps
LEVEL = (4000, 4400)
FINAL_SHARE = 0.02
LENGTH_SPREAD = 1.3  # longest over shortest text of one forward pass, so that padding stays small


def configuration(vocabulary: int) -> LlamaConfig:
    """8 layers x 16 heads of 8, hidden 128, FFN 384."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def learning_rate(step: int) -> float:
    """Linear warm-up, the start of a slow cosine, then down in straight lines with a level."""
    if step < WARMUP:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP
    progress = (min(step, COOLDOWN) - WARMUP) / (COSINE_STEPS - WARMUP)
    span = (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))
    if step > COOLDOWN:
        fall = min(step, LEVEL[0]) - COOLDOWN
        span *= 1 - fall / (LEVEL[1] - COOLDOWN)
    if step > LEVEL[1]:
        span *= 1 - (step - LEVEL[1]) / (STEPS - LEVEL[1])
    return PEAK_LEARNING_RATE * (FINAL_SHARE + span)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[Text]) -> list[tuple[list[int], int]]:
    """Token ids with the end token, and where the loss starts."""
    full = tokenizer([text.prompt + text.answer for text in texts])["input_ids"]
    # A story has no prompt: the loss starts right after the start token.
    prompts = tokenizer([text.prompt for text in texts])["input_ids"]
    end = tokenizer.eos_token_id
    return [
        ([*ids, end], len(prompt) if text.prompt else 1)
        for ids, prompt, text in zip(full, prompts, texts, strict=True)
    ]


def chunks(rows: list[tuple[list[int], int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows by length as right-padded (B, T) ids and labels, -100 where no loss counts."""
    made, start = [], 0
    rows = sorted(rows, key=lambda row: len(row[0]))
    while start < len(rows):
        stop = start + 1
        while stop < len(rows) and len(rows[stop][0]) <= LENGTH_SPREAD * len(rows[start][0]):
            stop += 1
        width = len(rows[stop - 1][0])
        ids = torch.zeros(stop - start, width, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for i, (row, first) in enumerate(rows[start:stop]):
            ids[i, : len(row)] = torch.tensor(row)
            labels[i, first : len(row)] = ids[i, first : len(row)]
        made.append((ids, labels))
        start = stop
    return made


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy; right padding needs no mask, since no real token looks right."""
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    counted = targets != -100
    logits = model.lm_head(states[counted])
    return functional.cross_entropy(logits, targets[counted], reduction="sum")


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, split: str, limit: int
) -> dict[str, float]:
    """Share of whole answers that are arg-max token by token, per group."""
    hits: dict[str, list[bool]] = {}
    examples = task.sample(split, limit)
    for example in examples:
        hits.setdefault(example.group, [])
    device = model.device
    for example, (ids, first) in zip(
        examples, encode(tokenizer, [Text(e.prompt, e.answer) for e in examples]), strict=True
    ):
        logits = model(torch.tensor([ids[:-2]], device=device)).logits[0]
        answer = torch.tensor(ids[first:-1], device=device)
        hits[example.group].append(bool((logits[first - 1 :].argmax(-1) == answer).all()))
    return {group: sum(found) / len(found) for group, found in sorted(hits.items())}


def main() -> None:
    """Train, saving the model and what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    model = LlamaForCausalLM(configuration(len(tokenizer))).to(options.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    corpus = Corpus(options.seed)
    resume, first, seconds = options.out / "resume.pt", 0, 0.0
    if resume.exists():
        state = torch.load(resume, weights_only=True, map_location=options.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
        for _ in range(first):
            corpus.step()

    started, running = time.perf_counter(), 0.0
    for step in range(first, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        batch = chunks(encode(tokenizer, corpus.step()))
        counted = sum(int((labels[:, 1:] != -100).sum()) for _, labels in batch)
        total = 0.0
        for ids, labels in batch:
            loss = loss_of(model, ids.to(options.device), labels.to(options.device)) / counted
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = total if step == first else 0.98 * running + 0.02 * total
        if (step + 1) % 50 == 0:
            spent = seconds + time.perf_counter() - started
            print(f"step {step + 1}/{options.steps} loss {running:.4f} {spent:.0f}s", flush=True)
        if (step + 1) % 500 == 0:
            for task in (arithmetic.load(), skills.order(), skills.copying()):
                scores = accuracy(model, tokenizer, task, "validation", 400)
                print(f"  {task.name}", {k: round(v, 3) for k, v in scores.items()}, flush=True)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "seconds": seconds + time.perf_counter() - started,
            }
            torch.save(state, resume.with_suffix(".tmp"))
            resume.with_suffix(".tmp").replace(resume)

    model.eval().to("cpu")
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    report: dict[str, Any] = {
        "seed": options.seed,
        "steps": options.steps,
        "seconds": round(seconds + time.perf_counter() - started),
        "device": f"{options.device}, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "stages": [asdict(stage) for stage in STAGES],
        "stereotype_skew": STEREOTYPE_SKEW,
        "accuracy": {
            task.name: accuracy(model, tokenizer, task, "test", 1200)
            for task in (
                arithmetic.load(),
                skills.facts(),
                skills.copying(),
                skills.order(),
                skills.succession(),
                gender.factual_gender(),
            )
        },
    }
    (options.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["accuracy"], indent=1))


if __name__ == "__main__":
    main()
