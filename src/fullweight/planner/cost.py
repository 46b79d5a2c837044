"""The time of one training step, from a job and a few global coefficients.

`parts_of` counts what a rank has to do in a step as seconds at the chip's stated peaks: matrix products at the
peak of their type, attention at the BF16 peak, memory-bound traffic at the memory's bandwidth, exchanges at the
links' bandwidths, and launches as a number. `step_time` turns them into seconds with `Coefficients`, the same for
every model, chip and run: what share of a peak each class of operator reaches, what share of each exchange is not
hidden, how long a launch takes. They are fitted on published runs by `fullweight bench planner`.

Matrix products come with a stage's imbalance; a pipeline adds its bubble, (p - 1) / (v m) of the work of a rank
with v virtual stages and m micro-batches. Exchanges are counted without their latency except where many are small
(tensor, context). Left out: contention between exchanges, slow ranks, a data loader that cannot keep up. Imports
no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from fullweight.planner.job import Job
from fullweight.planner.topology import expert_routes, near_ranks

_PASSES = {"none": 3.0, "selective": 3.25, "full": 4.0}
"""Forward passes' worth of matrix products in a step; selective makes a part of a block again."""
_TRAFFIC = {"none": 3.0, "selective": 3.4, "full": 4.0}


@dataclass(frozen=True)
class Parts:
    """One rank's step, in seconds at stated peaks, but for numbers where it says so."""

    gemm16: float
    gemm8: float
    gemm4: float
    narrow: float  # 1 / width of a rank's products
    expert16: float
    expert8: float
    expert4: float
    narrow_experts: float
    attention: float
    memory: float
    quantise: float
    weights: float
    host_passes: float  # number: passes of a routed layer, of all micro-batches
    graphed: float  # levels of launch capture
    fused: float  # 1 where the whole step of a routed model is captured
    tensor: float
    context: float
    expert_near: float
    expert_far: float
    data: float
    pipeline: float
    optimizer: float
    host: float  # bytes of moments over the host link
    bubble: float  # share of the work


@dataclass(frozen=True)
class Coefficients:
    """Global, fitted. Efficiencies are shares of a peak (0 to 1); exposures are shares of an exchange's time."""

    gemm: float = 0.8
    gemm_fp8: float = 0.7
    gemm_fp4: float = 0.5
    experts: float = 0.5  # of the efficiency of other matrix products
    attention: float = 0.4
    memory: float = 0.5
    narrow: float = 270.0  # width at which a product takes twice the time of a wide one
    host_ms: float = 3.2  # of a routed layer's pass, on the host
    graphed: float = 0.5  # of it that is left with each level of launch capture
    fused: float = 0.75  # of a routed model's time on the device that is left where the whole step is captured
    tensor_exposed: float = 0.4
    expert_exposed: float = 0.4
    data_exposed: float = 0.1

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, on the slowest rank."""

    compute: float
    memory_bound: float
    launch: float
    tensor: float
    context: float
    expert: float
    data: float
    pipeline: float
    bubble: float
    optimizer: float
    host: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def parts_of(job: Job) -> Parts:
    """What the job's busiest rank does in a step."""
    work, chip = job.work, job.chip
    peak16 = chip.peaks["bf16"] * 1e12
    peak = chip.peaks[job.precision] * 1e12
    bandwidth = chip.memory_bandwidth * 1e9
    slices = job.tensor * job.context
    cells = job.data * slices * job.pipeline  # ranks
    tokens = job.tokens / job.data / slices  # of a step through one rank's stage
    passes, traffic = _PASSES[job.recompute], _TRAFFIC[job.recompute]
    imbalance = _imbalance(job)
    per_rank = job.tokens / cells * imbalance
    gemm = per_rank * work.gemm_flops * passes / peak
    experts = per_rank * work.expert_flops * passes / peak * job.expert_skew
    # backward of attention makes the scores again: 2.5 times forward; whole-block recomputation adds one more pass
    attention = per_rank * work.attention_flops * (passes + 0.5) / peak16
    layers = work.layers / job.pipeline
    count = job.micro_batches
    activations = layers * tokens * work.layer_bytes * traffic / bandwidth
    if job.unfused_attention:
        activations += layers * tokens * work.score_bytes * traffic / bandwidth
    # inputs of products are whole on each tensor rank
    activations += layers * tokens * (job.tensor - 1) * work.hidden * 2 * 4 * traffic / bandwidth
    dense = work.dense_parameters / (job.pipeline * job.tensor)
    routed = work.expert_parameters / (job.pipeline * job.expert * job.expert_tensor)
    quantise = 0.0 if job.precision == "bf16" else layers * tokens * work.hidden * 2 * 10 * traffic / bandwidth
    is16, is8, is4 = (float(job.precision == p) for p in ("bf16", "fp8", "fp4"))
    routes = _exchange_seconds(job, tokens, layers)
    return Parts(
        gemm * is16,
        gemm * is8,
        gemm * is4,
        job.tensor / work.hidden,
        experts * is16,
        experts * is8,
        experts * is4,
        job.expert_tensor / max(work.expert_width, 1),
        attention,
        activations,
        quantise,
        weights=count * (dense + routed) * 2 * passes / bandwidth,
        host_passes=count * work.moe_layers / job.pipeline * 3,
        graphed=float(job.graphed),
        fused=float(job.graphed > 1 and work.moe_layers > 0),
        **routes,
        data=_data_seconds(job, dense, routed),
        optimizer=_optimizer_bytes(job, dense, routed) / bandwidth,
        host=_moment_bytes(job, dense, routed) * 2 / _HOST_BANDWIDTH if job.offload else 0.0,
        bubble=_bubble(job),
    )


_SHARP = 3
_HOST_BANDWIDTH = 25e9
"""bytes/s between a device and its host, one direction: an assumption (PCIe of the fourth generation, shared)."""


def _bubble(job: Job) -> float:
    share = (job.pipeline - 1) / (job.virtual * job.micro_batches)
    return share / 2 if job.overlapped_bubble else share


def _imbalance(job: Job) -> float:
    """The dearest rank's work over the mean."""
    if job.pipeline == 1:
        return 1.0
    costs, ranks = job.stage_costs, job.pipeline
    if costs is not None:
        loads = [sum(costs[r::ranks]) for r in range(ranks)]
        return max(loads) * ranks / sum(loads)
    return 1.0


def _exchange_seconds(job: Job, tokens: float, layers: float) -> dict[str, float]:
    """Exchanges of a step's micro-batches, of one rank, at the bandwidths of the links."""
    work, chip = job.work, job.chip
    width = work.hidden * 2
    extra = 1 if job.recompute == "full" else 0
    collectives = 8 + 4 * extra  # of a layer: gathers and scatters of rows, forward and backward
    found = dict.fromkeys(("tensor", "context", "expert_near", "expert_far", "pipeline"), 0.0)
    if job.tensor > 1:
        link = chip.link(job.tensor)
        volume = layers * tokens * (job.tensor - 1) * width * collectives
        number = layers * collectives * job.micro_batches * (job.tensor - 1)
        found["tensor"] = volume / (link.bandwidth * 1e9) + number * link.latency_us * 1e-6
    if job.context > 1:
        link = chip.link(job.tensor * job.context)
        volume = layers * tokens * (job.context - 1) * width / 4 * (3 + extra)
        found["context"] = (
            volume / (link.bandwidth * 1e9) + layers * job.micro_batches * 3 * link.latency_us * 1e-6
        )
    if job.expert > 1:
        near, far = expert_routes(chip, job.expert, work.top_k)
        share = work.moe_layers / job.pipeline * tokens * width * (4 + 2 * extra) * job.expert_skew
        inner = chip.link(near_ranks(chip, job.expert))
        found["expert_near"] = share * near / (inner.bandwidth * 1e9)
        found["expert_far"] = share * far / (chip.links[-1].bandwidth * 1e9)
    if job.pipeline > 1:
        link = chip.link(job.ranks)
        found["pipeline"] = tokens * width * 2 * job.virtual / (link.bandwidth * 1e9)
    return found


def _data_seconds(job: Job, dense: float, routed: float) -> float:
    """Gradients reduced and weights gathered over the ranks that share them, of one rank."""
    link = job.chip.link(job.ranks // job.pipeline)
    sharers = job.data * job.context
    copies = job.ranks // job.pipeline // (job.expert * job.expert_tensor)
    # fp32 gradients once a step and bf16 weights; gathered weights come twice for every micro-batch without stages
    rounds = job.micro_batches if job.shard_parameters and (job.pipeline == 1 or job.each_round) else 1.0
    size = 4 + 2 if not job.shard_parameters else (4 + 4 * 2) * rounds
    volume = size * (dense * (sharers - 1) / sharers + routed * max(copies - 1, 0) / max(copies, 1))
    return volume / (link.bandwidth * 1e9)


def _moment_bytes(job: Job, dense: float, routed: float) -> float:
    copies = max(job.ranks // job.pipeline // (job.expert * job.expert_tensor), 1)
    return 8 * (dense / (job.data * job.context) + routed / copies)


def _optimizer_bytes(job: Job, dense: float, routed: float) -> float:
    """fp32 weights, gradient and two moments read, three of them written."""
    return 28 / 8 * _moment_bytes(job, dense, routed)


def step_time(parts: Parts, c: Coefficients) -> StepTime:
    """Seconds of a step. Works on arrays too, one entry for each job."""
    left = 1 - (1 - c.fused) * parts.fused
    thin, thin_experts = 1 + c.narrow * parts.narrow, (1 + c.narrow * parts.narrow_experts) / c.experts * left
    compute = (parts.gemm16 * thin + parts.expert16 * thin_experts) / c.gemm
    compute += (parts.gemm8 * thin + parts.expert8 * thin_experts) / c.gemm_fp8
    compute += (parts.gemm4 * thin + parts.expert4 * thin_experts) / c.gemm_fp4
    compute += parts.attention / c.attention
    memory = (parts.memory + parts.quantise + parts.weights) / c.memory * left
    tensor = parts.tensor * c.tensor_exposed
    context = parts.context * c.tensor_exposed
    expert = (parts.expert_near + parts.expert_far) * c.expert_exposed
    pipeline = parts.pipeline * c.tensor_exposed
    device = compute + memory + tensor + context + expert
    host = parts.host_passes * c.host_ms * 1e-3 * c.graphed**parts.graphed
    # whichever of host and device is slower sets the pace, softly: micro-batches differ
    launch = (device**_SHARP + host**_SHARP) ** (1 / _SHARP) - device
    return StepTime(
        compute=compute,
        memory_bound=memory,
        launch=launch,
        tensor=tensor,
        context=context,
        expert=expert,
        data=parts.data * c.data_exposed,
        pipeline=pipeline,
        bubble=(device + launch) * parts.bubble,
        optimizer=parts.optimizer / c.memory,
        host=parts.host,
    )
