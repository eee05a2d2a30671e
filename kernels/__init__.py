"""One op a file: formula, Triton kernel, launcher, public function, and its reference, `<op>_ref`."""

from esengine.kernels.depthwise_gate import depthwise_gate, depthwise_gate_ref
from esengine.kernels.es_update import (
    PAIRS_PER_CHUNK,
    UpdatePlan,
    check_fitness,
    es_update,
    es_update_chunk,
    es_update_ref,
)
from esengine.kernels.factors import STORE_FROM, member_factors, member_factors_ref
from esengine.kernels.fused_linear import fused_linear, fused_linear_ref
from esengine.kernels.linear_attention import linear_attention, linear_attention_ref, takes_low
from esengine.kernels.low_rank_part import low_rank_part, low_rank_part_ref
from esengine.kernels.noise import (
    CONTRACT,
    NoisePlan,
    Streams,
    factor,
    factor_ref,
    key_words,
    linear_streams,
    normals,
    normals_ref,
    padded_rank,
    pair_weights,
    philox_ref,
    signed_sigma,
    step_tensor,
    stream_id,
    uses_triton,
)
from esengine.kernels.operands import Lora, LowRank, MemberNoise, stream_table
from esengine.kernels.population_linear import (
    low_rank_part_torch,
    population_linear,
    population_linear_ref,
    population_linear_torch,
)
from esengine.kernels.residual_norm import Stream, residual_norm, residual_norm_ref
from esengine.kernels.rms_norm import rms_norm, rms_norm_ref
from esengine.kernels.shrink import Modulation, mix, mix_ref, shrink, shrink_ref, takes_partial_sums
from esengine.kernels.vml import resolve_vml

resolve_vml()  # at import, before any other op

__all__ = [
    "CONTRACT",
    "PAIRS_PER_CHUNK",
    "STORE_FROM",
    "Lora",
    "LowRank",
    "MemberNoise",
    "Modulation",
    "NoisePlan",
    "Stream",
    "Streams",
    "UpdatePlan",
    "check_fitness",
    "depthwise_gate",
    "depthwise_gate_ref",
    "es_update",
    "es_update_chunk",
    "es_update_ref",
    "factor",
    "factor_ref",
    "fused_linear",
    "fused_linear_ref",
    "key_words",
    "linear_attention",
    "linear_attention_ref",
    "linear_streams",
    "low_rank_part",
    "low_rank_part_ref",
    "low_rank_part_torch",
    "member_factors",
    "member_factors_ref",
    "mix",
    "mix_ref",
    "normals",
    "normals_ref",
    "padded_rank",
    "pair_weights",
    "philox_ref",
    "population_linear",
    "population_linear_ref",
    "population_linear_torch",
    "residual_norm",
    "residual_norm_ref",
    "rms_norm",
    "rms_norm_ref",
    "shrink",
    "shrink_ref",
    "signed_sigma",
    "step_tensor",
    "stream_id",
    "stream_table",
    "takes_low",
    "takes_partial_sums",
    "uses_triton",
]
