"""The strategies that ship with tokenprune, registered like those of any plugin. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from tokenprune import PipelineSpec, Spec, StageSpec, hookimpl

_SPECPRUNE = "SpecPrune-VLA, arXiv 2509.05614"
_ADP = "VLA-ADP, arXiv 2509.22093 (ICLR 2026)"
_EFFICIENT = "EfficientVLA, arXiv 2506.10100 (NeurIPS 2025)"
_STAGES = (
    StageSpec(
        "none",
        "baseline",
        "drops nothing and is called at every cut: measures the cost of the framework itself",
        f"{__name__}.baselines.none:Nothing",
    ),
    StageSpec("random", "baseline", "keeps tokens at random", f"{__name__}.baselines.random:Random"),
    StageSpec(
        "uniform_grid",
        "baseline",
        "keeps an evenly spread grid of each view's patches",
        f"{__name__}.baselines.uniform_grid:UniformGrid",
    ),
    StageSpec(
        "keep_view",
        "baseline",
        "keeps all patches of named views and none of the others",
        f"{__name__}.baselines.keep_view:KeepView",
    ),
    StageSpec(
        "pool2x2",
        "baseline",
        "averages squares of 2 x 2 patches",
        f"{__name__}.baselines.pooling:Pool",
        requires=frozenset({"merge"}),
    ),
    StageSpec(
        "fastv",
        "scorer",
        "keeps the patches that an early layer attends to most",
        f"{__name__}.fastv:FastV",
        paper="FastV, arXiv 2403.06764 (ECCV 2024)",
    ),
    StageSpec(
        "divprune",
        "selector",
        "keeps the patches whose embeddings differ most from each other",
        f"{__name__}.divprune:DivPrune",
        paper="DivPrune, arXiv 2503.02175 (CVPR 2025)",
    ),
    StageSpec(
        "sparsevlm",
        "scorer",
        "keeps, at three depths, the patches that the most visual text tokens attend to",
        f"{__name__}.sparsevlm:SparseVLM",
        paper="SparseVLM, arXiv 2410.04417 (ICML 2025)",
        requires=frozenset({"merge"}),
    ),
    StageSpec(
        "pyramiddrop",
        "scorer",
        "keeps, at three depths, the half that the next layer would attend to most",
        f"{__name__}.pyramiddrop:PyramidDrop",
        paper="PyramidDrop, arXiv 2410.17247 (CVPR 2025)",
    ),
    StageSpec(
        "dart",
        "scorer",
        "keeps a few pivots and the patches least similar to them",
        f"{__name__}.dart:DART",
        paper="DART, arXiv 2502.11494 (EMNLP 2025)",
    ),
    StageSpec(
        "fastervlm",
        "selector",
        "keeps the patches that the vision tower attends to most",
        f"{__name__}.fastervlm:FasterVLM",
        paper="FasterVLM, arXiv 2412.01818",
        requires=frozenset({"encoder_attention"}),
    ),
    StageSpec(
        "visionzip",
        "selector",
        "keeps the patches that the vision tower attends to most, and merges the rest into a few tokens",
        f"{__name__}.visionzip:VisionZip",
        paper="VisionZip, arXiv 2412.04467 (CVPR 2025)",
        requires=frozenset({"encoder_attention", "merge"}),
    ),
    StageSpec(
        "trim",
        "selector",
        "keeps the patches that a CLIP relates to the instruction, and the mean of the others",
        f"{__name__}.trim:TRIM",
        paper="TRIM, arXiv 2409.10994 (COLING 2025)",
        requires=frozenset({"merge"}),
    ),
    StageSpec(
        "prumerge",
        "selector",
        "keeps the patches with outlying attention in the vision tower, and merges the others into them",
        f"{__name__}.prumerge:PruMerge",
        paper="LLaVA-PruMerge, arXiv 2403.15388 (ICCV 2025)",
        requires=frozenset({"encoder_attention", "merge"}),
    ),
    StageSpec(
        "tome",
        "selector",
        "merges the most similar pairs of patches",
        f"{__name__}.tome:ToMe",
        paper="ToMe, arXiv 2210.09461 (ICLR 2023)",
        requires=frozenset({"merge"}),
    ),
    StageSpec(
        "efficientvla_tokens",
        "scorer",
        "keeps patches that the text attends to most, and patches least similar to them",
        f"{__name__}.efficientvla:EfficientVLATokens",
        paper=_EFFICIENT,
    ),
    StageSpec(
        "layer_skip_cosine",
        "shortcut",
        "leaves out the decoder layers that `layer_cosine` finds to change tokens least",
        f"{__name__}.layer_skip:LayerSkip",
        paper=_EFFICIENT,
        requires=frozenset({"layer_skip"}),
    ),
    StageSpec(
        "head_cache",
        "shortcut",
        "runs the action head's layers at one flow step of several",
        f"{__name__}.head_cache:HeadCache",
        paper=_EFFICIENT,
        requires=frozenset({"head_cache"}),
    ),
    StageSpec(
        "layer_cosine",
        "baseline",
        "measures how much each layer changes the tokens; drops nothing",
        f"{__name__}.layer_skip:LayerCosine",
        paper=_EFFICIENT,
    ),
    StageSpec(
        "vla_cache",
        "scorer",
        "reuses keys and values of the last query for patches that did not change",
        f"{__name__}.vla_cache:VLACache",
        paper="VLA-Cache, arXiv 2502.02175 (NeurIPS 2025)",
        requires=frozenset({"kv_reuse"}),
    ),
    StageSpec(
        "ttf",
        "scorer",
        "reuses the features of patches that did not change; drops nothing",
        f"{__name__}.ttf:TTF",
        paper="TTF-VLA, arXiv 2508.19257 (AAAI 2026)",
    ),
    StageSpec(
        "sp_vla",
        "selector",
        "keeps edges, and fewer of the other patches the faster the arm moves vertically",
        f"{__name__}.sp_vla:SPVLA",
        paper="SP-VLA, arXiv 2506.12723 (ICLR 2026)",
        requires=frozenset({"encoder_attention"}),
    ),
    StageSpec(
        "vla_adp",
        "selector",
        "keeps the patches most similar to the text in the first layer's projections",
        f"{__name__}.vla_adp:Relevance",
        paper=_ADP,
    ),
    StageSpec(
        "vla_adp.gate",
        "controller",
        "prunes while the end effector travels far, by achieved poses",
        f"{__name__}.vla_adp:Gate",
        paper=_ADP,
    ),
    StageSpec(
        "vla_pruner",
        "scorer",
        "keeps diverse patches among those that the prefix or recent actions attend to",
        f"{__name__}.vla_pruner:VLAPruner",
        paper="VLA-Pruner, arXiv 2511.16449",
    ),
    StageSpec(
        "sp_vla.scheduler",
        "controller",
        "extrapolates actions without the model while the arm moves steadily",
        f"{__name__}.sp_vla_scheduler:Scheduler",
        paper="SP-VLA, arXiv 2506.12723 (ICLR 2026)",
    ),
    StageSpec(
        "specprune.static",
        "scorer",
        "keeps patches that changed, or that the previous query or the first layers attend to",
        f"{__name__}.specprune.static:Static",
        paper=_SPECPRUNE,
    ),
    StageSpec(
        "specprune.dynamic",
        "scorer",
        "keeps fewer tokens the deeper the layer, by ranks averaged over layers",
        f"{__name__}.specprune.dynamic:Dynamic",
        paper=_SPECPRUNE,
    ),
    StageSpec(
        "specprune.controller",
        "controller",
        "chooses coarse mode while the arm travels, fine mode while it works",
        f"{__name__}.specprune.controller:Controller",
        paper=_SPECPRUNE,
    ),
)
_RELEASED = StageSpec(
    "specprune.static_c3",
    "scorer",
    "the static stage of the final released code, for comparison only",
    f"{__name__}.specprune.static_c3:StaticC3",
    paper=f"{_SPECPRUNE}, code 8091adc",
    requires=frozenset({"action_rows"}),
)
_PRESETS = {
    "specprune": "controller, static and dynamic stage of SpecPrune-VLA, with fixed counts",
    "specprune-paper": "SpecPrune-VLA by the third version of its paper",
    "specprune-c3": "SpecPrune-VLA with the selection of its final released code, for comparison",
    "prumerge-plus": "PruMerge+: an even sample of patches stays besides the outliers",
    "sparsevlm-recycle": "SparseVLM with recycling: the best tokens that leave stay as means of clusters",
    "sp_vla-scheduled": "SP-VLA's scheduler, and its token pruning in the queries that reach the model",
    "efficientvla": "EfficientVLA on a flow head: fewer patches, and the head's layers at one step of five",
}
_COMPOSED = {
    "diverse-then-attended": "DivPrune, then FastV, and more of both while the arm works (SpecPrune's controller)",
    "attended-and-spread": "FastV and an even grid, summed by rank at one cut",
    "seen-then-dropped": "FasterVLM before layer 0, then PyramidDrop",
    "gated-static": "SpecPrune's static stage behind VLA-ADP's gate",
    "merged-then-attended": "ToMe before layer 0, then FastV",
}


@hookimpl
def tokenprune_register() -> Iterable[Spec]:
    """The stages, a pipeline of the same name for each, and presets that combine several stages."""
    files = {**{stage.name: stage.summary for stage in _STAGES}, **_PRESETS, **_COMPOSED}
    pipelines = (PipelineSpec(name, summary, __name__, f"pipelines/{name}.yaml") for name, summary in files.items())
    return (*_STAGES, _RELEASED, *pipelines)
