"""What verbs that choose units take beside counts: one budget of costs, alignment, KV groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from prune_edit.allocate import KV_RULES
from prune_edit.costs import KINDS, Costs, counted_costs
from prune_edit.decoder import Decoder
from prune_edit.errors import BudgetError
from prune_edit.evaluation.latency import measure_latency
from prune_edit.layout import Layout
from prune_edit.planning import Plan
from prune_edit.rules import Rules, budget_of, check_alone, parse_budget, widths_of
from prune_edit.running import Progress
from prune_edit.scoring import Scores
from prune_edit.verbs.common import check_known
from prune_edit.workspace import Workspace

ENGINES = ("vllm",)
"""Engines that ask something of a plan: vLLM, a KV group in every layer."""


def check_layers_alone(layers: tuple[int, ...] | None, budget: str | None) -> None:
    """Raise BudgetError for one budget over all layers beside layers of its own for neurons."""
    if layers is not None and budget is not None:
        raise BudgetError(
            f"--budget {budget} is of all layers; leave out --neuron-layers, or give "
            "--keep-neurons instead"
        )


@dataclass(frozen=True)
class Asked:
    """What the user asked for, checked as far as it goes without a model."""

    budget: str | None = None
    budget_of: str = "parameters"
    align: int = 1
    kv: str = "pad"
    whole_blocks: bool = False
    serve: str = ""

    def check(self, **others: bool) -> None:
        """Raise PruneEditError for what does not go together.

        `others` say, by flag, whether other budgets are given.
        """
        check_known("cost", self.budget_of, KINDS)
        check_known("kv rule", self.kv, KV_RULES)
        if self.serve:
            check_known("engine", self.serve, ENGINES)
        if self.align < 1:
            raise BudgetError(f"--align {self.align} is no number of neurons; give at least 1")
        flags = [(f"--{name.replace('_', '-')}", there) for name, there in others.items()]
        check_alone(self.budget, flags)
        if self.budget is None:
            if self.whole_blocks:
                raise BudgetError("--whole-blocks needs a --budget, such as 20%")
            if self.budget_of != "parameters":
                raise BudgetError(
                    f"--budget-of {self.budget_of} needs a --budget, such as 20%, too"
                )
            return
        parse_budget(self.budget)

    def rules(
        self, decoder: Decoder, progress: Progress, workspace: Workspace | None = None
    ) -> Rules:
        """The rules for a model. Latency is measured, or found in the workspace.

        Raises BudgetError for an alignment that no layer can keep.
        """
        layout = decoder.layout
        rules = Rules(
            self.kv,
            self.align,
            widths_of(layout.neurons),
            layout.n_heads // layout.n_kv_heads,
            whole_blocks=self.whole_blocks,
            every_layer=decoder.n_layers if self.serve else 0,
        )
        rules.check()
        if self.budget is None:
            return rules
        costs = _costs(decoder, self.budget_of, progress, workspace or Workspace())
        if self.kv == "duplicate":
            costs = replace(costs, kv=self.kv)
        share = parse_budget(self.budget)
        budget = budget_of(share, costs, layout.heads, layout.neurons)
        return replace(rules, costs=costs, budget=budget)

    def counted(self, scores: Scores, layout: Layout | None) -> Rules:
        """The rules for budgets by count, as far as scores, and a layout for groups, have them."""
        widths = (~scores.neurons.isnan()).sum(1).tolist()
        group = 1 if layout is None else layout.n_heads // layout.n_kv_heads
        every = scores.heads.shape[0] if self.serve else 0
        rules = Rules(self.kv, self.align, tuple(widths), group, every_layer=every)
        if any(widths):
            rules.check()
        return rules

    def noted(self, plan: Plan, rules: Rules) -> Plan:
        """The plan with the rules it was made by, and the costs where they were measured."""
        costs = rules.costs
        return replace(
            plan,
            kv=self.kv,
            align=self.align,
            serve=self.serve,
            budget="" if self.budget is None else f"{self.budget} of {self.budget_of}",
            costs=costs.to_dict() if costs is not None and costs.kind == "latency" else None,
        )


def budget_report(rules: Rules, plan: Plan) -> dict[str, Any]:
    """What a budget allowed, what the plan costs, and the costs themselves, as JSON."""
    if rules.costs is None:
        return {}
    found: Mapping[str, Any] = {
        "asked": plan.budget,
        "allowed": rules.budget,
        "kept": rules.costs.of_units(plan.heads, plan.neurons),
        "costs": rules.costs.to_dict(),
    }
    return {"budget": dict(found)}


def _costs(decoder: Decoder, kind: str, progress: Progress, workspace: Workspace) -> Costs:
    if kind != "latency":
        return counted_costs(decoder, kind)
    # A run that goes on must not measure other costs than it began with.
    names = ("slot", "group", "neuron", "attention", "ffn")
    kept = workspace.load_tensors("latency")
    if kept is not None and set(kept) == set(names):
        layout = decoder.layout
        found = (tuple(kept[name].tolist()) for name in names)
        return Costs(kind, layout.n_heads // layout.n_kv_heads, *found)
    costs = measure_latency(decoder, progress=progress)
    tensors = {name: torch.tensor(getattr(costs, name), dtype=torch.float64) for name in names}
    workspace.save_tensors("latency", tensors)
    return costs
