"""What each kind of finding means, when it is given, where it comes from, and what to do.

The documents have a page of it. Names in braces are thresholds, constants of the module that makes
the finding.
"""

from __future__ import annotations

from typing import NamedTuple


class Explanation(NamedTuple):
    """A kind of finding, in words."""

    meaning: str
    """A few words, without a capital or a full stop."""
    severity: str
    threshold: str
    cause: str
    remedy: str


#: The kinds that an analysis or a comparison finds, the first ones first within a severity.
EXPLANATIONS = {
    "non_finite": Explanation(
        "NaN or infinity in the weights",
        "critical",
        "One value of a tensor that is NaN or infinite.",
        "The training diverged, or a value left the range of float16 when it was saved.",
        "Take an earlier checkpoint; train with a lower learning rate, or save in bfloat16.",
    ),
    "untrained": Explanation(
        "every update is zero, and changes nothing",
        "critical",
        "The update of every module is exactly zero.",
        "B is still as it began: the file was saved before the first step, or what was trained was "
        "not what was saved.",
        "Look whether the adapter was active and its parameters were the optimizer's.",
    ),
    "zero_scale": Explanation(
        "the scale is zero",
        "critical",
        "α/r = 0, and nothing else of the module changes the weight.",
        "`lora_alpha` is 0 in the config, or in a pattern that fits the module.",
        "Set alpha to what the training used; `lorafast bake --alpha` writes it.",
    ),
    "zero_update": Explanation(
        "the update of a module is zero, and changes nothing",
        "warning",
        "The update of this module is exactly zero, those of others are not.",
        "No gradient reached the module: it was frozen, or not used in the forward pass.",
        "Leave it out of the target modules, or find out why it was not trained.",
    ),
    "dead_module": Explanation(
        "the update of a module is next to nothing",
        "warning",
        "‖ΔW‖ below {DEAD_SHARE:g} of the adapter's median, of at least {MIN_MODULES_TO_JUDGE} "
        "modules.",
        "Hardly any gradient reached the module.",
        "Leave it out of the target modules: it costs space and time and changes nothing.",
    ),
    "unusual_scale": Explanation(
        "α/r is out of the ordinary",
        "warning",
        "A scale outside {ORDINARY_SCALING[0]:g} to {ORDINARY_SCALING[1]:g}, 0 or negative; "
        "{MLX_SCALING:g} is what mlx-lm sets.",
        "Alpha and rank were mixed up, the config is not the one of these weights, or rsLoRA's "
        "alpha was taken over.",
        "Compare alpha, rank and `use_rslora` with what the training was started with.",
    ),
    "unusual_rank": Explanation(
        "the rank is out of the ordinary",
        "warning",
        "A rank above {LARGEST_ORDINARY_RANK}, or above what the weight's shape allows.",
        "The rank was set too high, or adapters were joined (`cat`), whose ranks add up.",
        "`lorafast resize --rank energy:0.99` writes what the update needs.",
    ),
    "spectral_outlier": Explanation(
        "the spectral norm is far above the adapter's median",
        "warning",
        "σ₁ above {SPECTRAL_OUTLIER:g} times the adapter's median, of at least "
        "{MIN_MODULES_TO_JUDGE} modules.",
        "The training became unstable in one layer, or memorized something there.",
        "Look at the module in earlier checkpoints (`lorafast trajectory`); lower the learning "
        "rate or clip gradients.",
    ),
    "dominant_module": Explanation(
        "one module carries most of the norm",
        "warning",
        "One module with more than {DOMINANT_SHARE:.0%} of Σ‖ΔW‖², of at least "
        "{MIN_MODULES_TO_JUDGE}.",
        "The training changed one layer and little else; often a head or an embedding.",
        "Look whether that is meant; otherwise give the module a lower rate, or a weight "
        "(`--weights 'PATTERN=0.5'`).",
    ),
    "overwhelming_update": Explanation(
        "the update is larger than the weight that it changes",
        "warning",
        "‖ΔW‖/‖W₀‖ above {OVERWHELMING_RELATIVE_NORM:g}; with `--base` alone.",
        "The base is another one, the scale is wrong, or the training diverged.",
        "Check which base the adapter was trained on, then alpha and rank.",
    ),
    "unused_rank": Explanation(
        "most of the rank is unused",
        "note",
        "99 % of the energy lies in at most {UNUSED_RANK_SHARE:.0%} of the directions, of a "
        "rank of "
        "{MIN_RANK_TO_JUDGE} or more.",
        "The rank is higher than the task needs.",
        "`lorafast resize --rank energy:0.99` writes a smaller adapter.",
    ),
    "exhausted_rank": Explanation(
        "the rank is used up",
        "note",
        "90 % of the energy needs at least {EXHAUSTED_RANK_SHARE:.0%} of the directions, of a rank "
        "of {MIN_RANK_TO_JUDGE} or more.",
        "The task would use more directions than there are; noise looks the same.",
        "Try a higher rank if the quality is not what it should be.",
    ),
    "feature": Explanation(
        "more than plain low-rank products",
        "note",
        "The adapter has something besides A and B: DoRA, biases, whole modules and the like.",
        "It was trained so.",
        "Nothing; programs that read plain factors alone would lose it.",
    ),
    "unmeasured": Explanation(
        "something that could not be measured",
        "note, in a comparison warning",
        "Some figure is missing; the finding says which and why.",
        "The base is missing, shapes do not fit, or values are not finite.",
        "Give the base (`--base`), or what the sentence names.",
    ),
    "no_modules": Explanation(
        "there is no low-rank update",
        "critical",
        "No pair of factors in the adapter.",
        "The file holds whole parameters or another method alone, or its names are not known.",
        "`lorafast inspect ADAPTER --tensors` shows what is there.",
    ),
    "duplicate": Explanation(
        "two adapters are one update",
        "warning",
        "The cosine of two updates is above {DUPLICATE_COSINE:g}.",
        "A copy: saved in other factors, another type, another scale, or under another name.",
        "Keep one of them; `lorafast duplicates` finds all in a directory.",
    ),
    "opposite": Explanation(
        "two adapters are one update with opposite signs",
        "warning",
        "The cosine of two updates is below −{DUPLICATE_COSINE:g}.",
        "One was made by negating the other.",
        "Merging both at equal weights changes nothing; keep one, and use a negative weight.",
    ),
    "different_modules": Explanation(
        "modules that only some of the adapters have",
        "note",
        "One module that not all of the adapters compared have.",
        "They were trained with other target modules.",
        "Nothing; cosines count a missing module as zero.",
    ),
}
