"""The time of one training step, from a job and a few global coefficients.

`parts_of` counts what a rank has to do in a step as seconds at the chip's stated peaks: matrix products at the
peak of their type, attention at the BF16 peak, memory-bound traffic at the memory's bandwidth, exchanges at the
links' bandwidths, and launches as a number. `step_time` turns them into seconds with `Coefficients`, the same for
every model, chip and run: what share of a peak each class of operator reaches, what share of each exchange is not
hidden, how long the host needs for a routed layer, how many watts a chip needs to hold its peak. They are fitted
on published runs by `fullweight bench planner`.

Matrix products come with a stage's imbalance; a pipeline adds its bubble, (p - 1) / (v m) of the work of a rank
with v virtual stages and m micro-batches. Where the host has to know how many tokens go where (a plain exchange)
it cannot run ahead of the device, and their times add up; else the slower one decides. Exchanges are counted
without their latency except where many are small (tensor, context). Left out: contention between exchanges, slow
ranks, a data loader that cannot keep up. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

from fullweight.planner.job import Job
from fullweight.planner.topology import expert_routes, near_ranks

PASSES = {"none": 3.0, "selective": 3.25, "full": 4.0}
"""Forward passes' worth of matrix products in a step; selective makes a part of a block again."""
_TRAFFIC = {"none": 3.0, "selective": 3.4, "full": 4.0}


@dataclass(frozen=True)
class Parts:
    """One rank's step, in seconds at stated peaks, but for numbers where it says so."""

    gemm16: float
    gemm8: float
    gemm4: float
    starved: float  # number: 1e12 FLOP/s of the BF16 peak a watt
    narrow: float  # 1 / width of a rank's products
    expert16: float
    expert8: float
    expert4: float
    narrow_experts: float
    attention: float
    memory: float
    weights: float
    host_passes: float  # number: passes of a routed layer that the host launches, of all micro-batches
    synchronous: float  # 1 where the host waits for the device in every routed layer
    fused: float  # 1 where the whole step of a routed model is captured
    tensor: float
    context: float
    expert_near: float
    expert_far: float
    data: float
    pipeline: float
    optimizer: float
    newton_schulz: float
    pieces: float  # of matrices that Muon makes orthogonal and that are cut
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
    watts: float = 0.5  # for 1e12 FLOP/s of the BF16 peak; with less, products slow down in proportion
    memory: float = 0.5
    narrow: float = 270.0  # width at which a product takes twice the time of a wide one
    host_ms: float = 3.2  # of a routed layer's pass, on the host
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
    newton_schulz: float
    pieces: float
    host: float

    @property
    def total(self) -> float:
        """Works on arrays too."""
        work = self.compute + self.memory_bound + self.launch + self.tensor + self.context + self.expert
        update = self.optimizer + self.newton_schulz + self.pieces
        return work + self.data + self.pipeline + self.bubble + update + self.host


def parts_of(job: Job) -> Parts:
    """What the job's busiest rank does in a step."""
    work, chip = job.work, job.chip
    peak16, peak = chip.peaks["bf16"] * 1e12, chip.peaks[job.precision] * 1e12
    bandwidth = chip.memory_bandwidth * 1e9
    tokens = job.tokens / job.data / (job.tensor * job.context)  # of a step through one rank's stage
    passes = PASSES[job.recompute]
    per_rank = tokens / job.pipeline * _imbalance(job)
    gemm = per_rank * work.gemm_flops * passes / peak
    experts = per_rank * work.expert_flops * passes / peak * job.expert_load
    layers, count = work.layers / job.pipeline, job.micro_batches
    dense = work.dense_parameters / (job.pipeline * job.tensor)
    routed = work.expert_parameters / (job.pipeline * job.expert * job.expert_tensor)
    is16, is8, is4 = (float(job.precision == p) for p in ("bf16", "fp8", "fp4"))
    return Parts(
        gemm * is16,
        gemm * is8,
        gemm * is4,
        chip.bf16_tflops / chip.power_w,
        job.tensor / work.hidden,
        experts * is16,
        experts * is8,
        experts * is4,
        job.expert_tensor / max(work.expert_width, 1),
        attention=_attention_flops(job, per_rank) / (peak if job.narrow_attention else peak16),
        memory=_activation_bytes(job, tokens, layers) / bandwidth,
        # weights are read in every pass, and a gradient of four bytes is read and written
        weights=count * (dense + routed) * (2 * passes + 8) / bandwidth,
        host_passes=count * work.moe_layers / job.pipeline * 3 * _LAUNCHES_LEFT[job.graphed],
        synchronous=float(job.dispatch == "plain" and not job.hidden_exchange),
        fused=float(job.graphed > 1 and work.moe_layers > 0),
        **_exchange_seconds(job, tokens, layers),
        data=_data_seconds(job, dense, routed),
        optimizer=_optimizer_bytes(job, dense, routed) / bandwidth,
        newton_schulz=job.muon.flops / peak16 if job.muon else 0.0,
        pieces=_piece_seconds(job),
        host=_moment_bytes(job, dense, routed) * 2 / _HOST_BANDWIDTH if job.offload else 0.0,
        bubble=_bubble(job),
    )


_LAUNCHES_LEFT = (1.0, 0.5, 0.0)
"""By level of capture. Half of a layer's launches lie outside of the captured parts: an assumption."""
_HOST_BANDWIDTH = 25e9
"""bytes/s between a device and its host, one direction: an assumption (PCIe of the fourth generation, shared)."""


def _attention_flops(job: Job, tokens: float) -> float:
    """Backward makes the scores again: 2.5 times forward; recomputation of whole blocks adds one more pass."""
    return tokens * job.work.attention_made * (PASSES[job.recompute] + 0.5)


def _activation_bytes(job: Job, tokens: float, layers: float) -> float:
    """Traffic of what is no matrix product, of one rank and step."""
    work = job.work
    each = work.layer_bytes
    if job.unfused_attention:
        each += work.score_bytes
    if job.precision != "bf16":
        each += work.input_bytes
    each += (job.tensor - 1) * work.hidden * 2 * 4  # inputs of products are whole on each tensor rank
    return layers * tokens * each * _TRAFFIC[job.recompute] + tokens / job.pipeline * work.head_bytes


def _bubble(job: Job) -> float:
    share = (job.pipeline - 1) / (job.virtual * job.micro_batches)
    return share / 2 if job.overlapped_bubble else share


def _imbalance(job: Job) -> float:
    """The dearest rank's work over the mean; where stages are not said, those of the best cut of whole layers."""
    if job.pipeline == 1:
        return 1.0
    costs = job.stage_costs or even_cut(job.work.stage_costs, job.pipeline * job.virtual)
    loads = [sum(costs[r :: job.pipeline]) for r in range(job.pipeline)]
    return max(loads) * job.pipeline / sum(loads)


@cache
def even_cut(costs: tuple[float, ...], count: int) -> tuple[float, ...]:
    """Costs of `count` runs of consecutive layers, the dearest as cheap as can be; empty runs come last."""
    low, high = max(costs), sum(costs)
    for _ in range(50):
        limit = (low + high) / 2
        low, high = (low, limit) if len(_runs(costs, limit)) <= count else (limit, high)
    found = _runs(costs, high)
    return tuple(found + [0.0] * (count - len(found)))


def _runs(costs: tuple[float, ...], limit: float) -> list[float]:
    """Costs of the longest runs of layers that stay below `limit`."""
    found = [0.0]
    for cost in costs:
        if found[-1] + cost > limit:
            found.append(0.0)
        found[-1] += cost
    return found


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
    if job.expert > 1 and not job.hidden_exchange:
        near, far = expert_routes(chip, job.expert, work.top_k, grouped=job.dispatch == "fused")
        share = work.moe_layers / job.pipeline * tokens * width * (4 + 2 * extra) * job.expert_load
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


def _piece_seconds(job: Job) -> float:
    """Pieces of cut matrices to their owners and back; nothing else runs meanwhile."""
    if job.muon is None:
        return 0.0
    return job.muon.bytes_waited / (job.chip.link(job.ranks // job.pipeline // job.replicate).bandwidth * 1e9)


def _own_numbers(job: Job, dense: float, routed: float) -> float:
    """Of parameters, on a rank."""
    copies = max(job.ranks // job.pipeline // (job.expert * job.expert_tensor), 1)
    return dense / (job.data * job.context) + routed / copies


def _moment_bytes(job: Job, dense: float, routed: float) -> float:
    if job.muon is None:
        return 8 * _own_numbers(job, dense, routed)
    return 4 * job.muon.entries + 8 * job.muon.others


def _optimizer_bytes(job: Job, dense: float, routed: float) -> float:
    """AdamW: fp32 weights, gradient and two moments read, three of them written.

    Muon: its operations one by one (`optim/muon.py`), momentum and decay 28 bytes, the direction and its scaling
    in fp32 44, to BF16 and what comes of it into the weights 16. Products of Newton-Schulz are counted as such.
    """
    if job.muon is None:
        return 28 * _own_numbers(job, dense, routed)
    return 88 * job.muon.entries + 28 * job.muon.others


_CORNER = 8
"""How sharply a chip goes from its full clock to one that its power allows."""


def step_time(parts: Parts, c: Coefficients) -> StepTime:
    """Seconds of a step. Works on arrays too, one entry for each job."""
    left = 1 - (1 - c.fused) * parts.fused
    thin, thin_experts = 1 + c.narrow * parts.narrow, (1 + c.narrow * parts.narrow_experts) / c.experts * left
    compute = (parts.gemm16 * thin + parts.expert16 * thin_experts) / c.gemm
    compute += (parts.gemm8 * thin + parts.expert8 * thin_experts) / c.gemm_fp8
    compute += (parts.gemm4 * thin + parts.expert4 * thin_experts) / c.gemm_fp4
    compute += parts.attention / c.attention
    slowed = (1 + (c.watts * parts.starved) ** _CORNER) ** (1 / _CORNER)
    compute *= slowed
    memory = (parts.memory + parts.weights) / c.memory * left
    tensor = parts.tensor * c.tensor_exposed
    context = parts.context * c.tensor_exposed
    expert = (parts.expert_near + parts.expert_far) * c.expert_exposed
    pipeline = parts.pipeline * c.tensor_exposed
    device = compute + memory + tensor + context + expert
    host = parts.host_passes * c.host_ms * 1e-3
    # the slower of host and device sets the pace, softly, since micro-batches differ; where the host waits for the
    # device in every layer, one works after the other
    launch = parts.synchronous * host + (1 - parts.synchronous) * ((device**2 + host**2) ** 0.5 - device)
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
        newton_schulz=parts.newton_schulz / c.gemm * slowed,
        pieces=parts.pieces,
        host=parts.host,
    )
