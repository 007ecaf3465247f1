"""Explain: why a model says what it says, and what tuning changed.

Every function gives a frozen value with `to_dict()`, which a notebook shows as the page does.
"""

from prune_edit.explain.answers import Answers, answers_with
from prune_edit.explain.carry import carries, carry_rows, explain_carries
from prune_edit.explain.chain import (
    Chain,
    DeepNode,
    Edge,
    HeadNode,
    ShallowNode,
    Size,
    explain_chain,
)
from prune_edit.explain.curves import (
    CurvePoint,
    Curves,
    Lowest,
    LowestRow,
    explain_curves,
    explain_lowest,
)
from prune_edit.explain.depth import Depth, LayerGain, explain_depth
from prune_edit.explain.heads import (
    Attention,
    AttentionRow,
    HeadMap,
    HeadMaps,
    attention_of,
    explain_heads,
)
from prune_edit.explain.hidden import (
    Concepts,
    Hidden,
    HiddenRow,
    arithmetic_concepts,
    explain_hidden,
    question_concepts,
)
from prune_edit.explain.lora import Amplification, LayerChange, Lora, explain_lora
from prune_edit.explain.neurons import Means, NeuronRow, Neurons, explain_neurons, neuron_means
from prune_edit.explain.question import Question, ask, token_rows
from prune_edit.explain.values import deep_layers, shallow_layers
from prune_edit.explain.whole import (
    About,
    LoraExplanation,
    PromptExplanation,
    TaskExplanation,
    about_of,
    explain_adapter,
    explain_prompt,
    explain_task,
)

__all__ = [
    "About",
    "Amplification",
    "Answers",
    "Attention",
    "AttentionRow",
    "Chain",
    "Concepts",
    "CurvePoint",
    "Curves",
    "DeepNode",
    "Depth",
    "Edge",
    "HeadMap",
    "HeadMaps",
    "HeadNode",
    "Hidden",
    "HiddenRow",
    "LayerChange",
    "LayerGain",
    "Lora",
    "LoraExplanation",
    "Lowest",
    "LowestRow",
    "Means",
    "NeuronRow",
    "Neurons",
    "PromptExplanation",
    "Question",
    "ShallowNode",
    "Size",
    "TaskExplanation",
    "about_of",
    "answers_with",
    "arithmetic_concepts",
    "ask",
    "attention_of",
    "carries",
    "carry_rows",
    "deep_layers",
    "explain_adapter",
    "explain_carries",
    "explain_chain",
    "explain_curves",
    "explain_depth",
    "explain_heads",
    "explain_hidden",
    "explain_lora",
    "explain_lowest",
    "explain_neurons",
    "explain_prompt",
    "explain_task",
    "neuron_means",
    "question_concepts",
    "shallow_layers",
    "token_rows",
]
