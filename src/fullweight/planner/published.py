"""Training runs that others published, as jobs with a measured step time; what cannot be used is told with its
reason.

Three tables lie in `runs/`, as they were collected: a mixed one of papers and model cards, Megatron-Bridge's
performance summary, and vTrain's measurements. A row is a case when its model, chip, precision and layout are
known. It is rejected when they are not, and when its figures contradict each other: tokens/s times FLOPs a token
has to be the FLOP/s that the row states (within `TOLERANCE`). Imports no torch.

A group is what cross-validation leaves out together: all rows of one document (`source`), or, of the large
performance summary, all rows of one model.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from fullweight.core.errors import ConfigError
from fullweight.planner.chips import chip
from fullweight.planner.families import families, family_work, shape_of_file
from fullweight.planner.job import Job, Precision, Recompute
from fullweight.planner.shapes import Shape, Work, work_of
from fullweight.planner.software import Software, software

TOLERANCE = 0.10


@dataclass(frozen=True)
class Case:
    """A measured run."""

    name: str
    group: str
    job: Job
    seconds: float
    recipe: str = ""  # what the document calls its precision, where it tells several apart

    @property
    def mfu(self) -> float:
        """Model FLOPs over the dense peak of the run's matrix type."""
        peak = self.job.chip.peaks[self.job.precision] * 1e12 * self.job.ranks
        return self.job.work.training_flops * self.job.tokens / self.seconds / peak

    @property
    def source(self) -> str:
        """The document; all of Megatron-Bridge's table is one."""
        return "bridge" if self.group.startswith("bridge ") else self.group

    @property
    def kind(self) -> Literal["dense", "moe"]:
        return "moe" if self.job.work.moe_layers else "dense"


@dataclass(frozen=True)
class Rejected:
    """A row that judges nothing, and why."""

    name: str
    reason: str


class UnusableError(Exception):
    """Why a row is no case."""


def load(folder: Path | None = None) -> tuple[list[Case], list[Rejected]]:
    """(cases, rejected rows) of those of the three tables that are in `folder`, or of those of the package.

    A model that is not known here may have its config.json, or its shape as TOML, in `folder` under its name.
    """
    cases: list[Case] = []
    rejected: list[Rejected] = []
    tables = {"published_runs.csv": _mixed, "megatron_bridge.csv": _bridge, "vtrain_multi.csv": _vtrain}
    where = resources.files("fullweight.planner").joinpath("runs") if folder is None else folder
    there = [file for file in tables if where.joinpath(file).is_file()]
    if not there:
        raise ConfigError(f"{where} holds none of {', '.join(tables)}; give the folder of such tables")
    for file in there:
        lines = where.joinpath(file).read_text(encoding="utf-8").splitlines()
        for number, row in enumerate(csv.DictReader(lines), 2):
            label = f"{file}:{number}"
            try:
                cases += list(tables[file](row, label, folder))
            except UnusableError as reason:
                rejected.append(Rejected(label + " " + _label(row), str(reason)))
    return cases, rejected


def _own_work(folder: Path | None, model: str, sequence: int) -> Work:
    """The work of a model whose file lies beside the tables."""
    for suffix in (".json", ".toml"):
        if folder is not None and (file := folder / f"{model}{suffix}").is_file():
            return work_of(shape_of_file(file), sequence)
    raise UnusableError(f"no shape of {model} is known, or its layers are of kinds that have no basis here")


def _label(row: dict[str, str]) -> str:
    return row.get("id") or f"{row.get('Model', '')} {row.get('System', '')} {row.get('container', '')}".strip()


def _number(text: str | None, what: str) -> float:
    try:
        return float((text or "").replace("~", "").replace("(", "").replace(")", "").split(" ")[0])
    except ValueError:
        raise UnusableError(f"{what} is not stated") from None


def _checked(name: str, group: str, job: Job, seconds: float, stated_tflops: float | None) -> Case:
    """The case, if FLOPs a token times tokens/s is what the row states."""
    if stated_tflops is not None:
        found = job.work.training_flops * job.tokens / seconds / job.ranks / 1e12
        if abs(found / stated_tflops - 1) > TOLERANCE:
            raise UnusableError(
                f"breaks the identity: {job.work.training_flops / 1e9:.1f} GFLOP a token x tokens/s is "
                f"{found:.0f} TFLOP/s a chip, the row states {stated_tflops:.0f}"
            )
    if job.micro_batches < 1 or job.ranks % (job.tensor * job.context * job.pipeline):
        raise UnusableError("its axes do not make its number of chips, or leave less than a micro-batch")
    return Case(name, group, job, seconds)


# ---- Megatron-Bridge ---------------------------------------------------------------------------------

_BRIDGE_MODELS = {
    "LLAMA3_8B": "llama3-8b",
    "LLAMA3_70B": "llama3-70b",
    "LLAMA3.1_405B": "llama3-405b",
    "DeepSeekV3": "deepseek-v3",
    "DeepSeekV3 (w/o MTP)": "deepseek-v3-no-mtp",
    "DeepSeekV3 (tokendrop)": "deepseek-v3",
    "Kimi_K2": "kimi-k2",
    "Qwen3_30B_a3B": "qwen3-30b-a3b",
    "Qwen3_30B_a3B (tokendrop)": "qwen3-30b-a3b",
    "Qwen3_235B_a22B": "qwen3-235b-a22b",
    "Qwen3_235B_a22B (tokendrop)": "qwen3-235b-a22b",
    "GPT OSS 120B": "gpt-oss-120b",
}
_PRECISIONS: dict[str, Precision] = {
    "BF16": "bf16",
    "FP16": "bf16",
    "FP8": "fp8",
    "MXFP8": "fp8",
    "MXFP8 Adam": "fp8",
    "FP8-CS": "fp8",
    "FP8-MX": "fp8",
    "NVFP4": "fp4",
}


def _bridge(row: dict[str, str], label: str, folder: Path | None) -> Iterator[Case]:
    model = row["Model"]
    if "LoRA" in row["section"]:
        raise UnusableError("LoRA: the base has no weight gradients")
    if not row["Precision"]:
        raise UnusableError("precision is not stated")
    precision = row["Precision"].split(" ")[0]
    if precision not in _PRECISIONS:
        raise UnusableError(f"precision {precision} is unknown")
    sequence = int(row["Sequence Length"])
    family = _BRIDGE_MODELS.get(model, model)
    if family == "deepseek-v3-no-mtp":
        work = _without_mtp(sequence)
    elif family in families():
        work = family_work(family, sequence)
    else:
        work = _own_work(folder, model, sequence)
    ranks, batch = int(row["#-GPUs"]), int(row["GBS"])
    fsdp = int(row["FSDP"] or 0)
    rate = _number(row["Tokens / sec / GPU"], "tokens/s")
    stated = float(re.split(r"[ \[]", row["Model TFLOP / sec / GPU"])[0])
    system = row["System"].removeprefix("DGX-")
    job = Job(
        work=work,
        chip=chip(system.lower()),
        ranks=ranks,
        sequence=sequence,
        global_batch=batch,
        micro_batch=int(row["MBS"]),
        tensor=int(row["TP"]),
        context=int(row["CP"]),
        pipeline=int(row["PP"]),
        virtual=int(row["VP"]) if row["VP"] not in ("", "n/a") else 1,
        expert=int(row["EP"]) if row["EP"] not in ("", "n/a") and work.moe_layers else 1,
        shard_parameters=fsdp > 1,
        recompute="none",
        precision=_PRECISIONS[precision],
        **asdict(software(model, system, row["container"])),
    )
    group = f"bridge {family.removesuffix('-no-mtp')}"
    case = _checked(f"{label} {model} {row['System']}", group, job, batch * sequence / rate / ranks, stated)
    yield replace(case, recipe=precision)


@cache
def _without_mtp(sequence: int) -> Work:
    return work_of(families()["deepseek-v3"].model_copy(update={"mtp_layers": 0}), sequence)


# ---- vTrain ------------------------------------------------------------------------------------------


def _vtrain(row: dict[str, str], label: str, folder: Path | None) -> Iterator[Case]:
    hidden, heads, layers = int(row["hidden size"]), int(row["attention heads"]), int(row["# layers"])
    sequence = int(row["sequence length"])
    job = Job(
        work=work_of(_gpt(layers, hidden, heads), sequence),
        chip=chip("a100"),
        ranks=int(row["# GPUs"]),
        sequence=sequence,
        global_batch=int(row["global batch"]),
        micro_batch=int(row["micro batch"]),
        tensor=int(row["tensor parallelism"]),
        pipeline=int(row["pipeline parallelism"]),
        recompute="full",
        unfused_attention=True,
    )
    yield _checked(label, "vtrain", job, float(row["iteration time (ms)"]) / 1e3, None)


@cache
def _gpt(layers: int, hidden: int, heads: int) -> Shape:
    values: dict[str, Any] = {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": heads}
    values |= {"head_dim": hidden // heads, "ffn": 4 * hidden, "vocab": 51200, "gated": False}
    return Shape.resolve({"name": f"gpt-{layers}x{hidden}", **values}, "a GPT")


# ---- papers and model cards --------------------------------------------------------------------------

_GPT_HEADS = {2304: 24, 4096: 32, 8192: 64, 12288: 96, 20480: 128, 6144: 64}
_CHIPS = {
    "GB300": "gb300",
    "GB200": "gb200",
    "B200": "b200",
    "H100": "h100",
    "H200": "h200",
    "H800": "h800",
    "A100-80": "a100",
    "H100-96 (500W)": "h100-500w",
    "Ascend 910C die (128 dies)": "ascend-910c",
}
_MOST_BUBBLE = 0.2
_FUSED_SINCE = 2022.8
"""When FlashAttention came into training frameworks."""
_YEARS = {
    "mlm21": 2021.3,
    "seqsel": 2022.3,
    "megascale": 2023.8,
    "titan": 2024.9,
    "llama405": 2024.2,
    "mlperf51": 2025.7,
}


_NEWEST = "99.12"


def _mixed_software(row: dict[str, str], overlapped: bool) -> Software:
    """What its release of Megatron-Bridge did, of a row from there, the newest where it names none."""
    if re.search(r"Megatron-Bridge|\bcard\b", row["source"]):
        release = re.search(r"\b\d\d\.\d\d\b", row["source"])
        model = row["model"].replace("DeepSeek-V3", "DeepSeekV3")
        return software(model, row["chip"], release[0] if release else _NEWEST)
    # torchtitan-npu sends a copy of each token for each expert; DualPipe hides the exchange behind other work
    return Software(dispatch="plain" if "Ascend" in row["chip"] else "fused", hidden_exchange=overlapped)


def _mixed(row: dict[str, str], label: str, folder: Path | None) -> Iterator[Case]:
    name = row["id"]
    if name.startswith("titan-"):
        yield _torchtitan(row, label)
        return
    if "untuned" in row["recompute/offload"]:
        raise UnusableError("its source calls it functional and untuned")
    if row["chip"] not in _CHIPS:
        raise UnusableError(f"chip {row['chip']!r} has no entry, or is one of several bins")
    ranks, sequence = int(_number(row["chips"], "the number of chips")), int(_number(row["seq"], "the row length"))
    batch = int(_number(row["GBS"], "the global batch"))
    precision = row["precision"] or ("bf16" if row["chip"].startswith("A100") else "")
    if name == "mlperf51-h200-1024":
        precision = "FP8"  # the chip has no FP4
    if precision.split(";")[0] not in {*_PRECISIONS, "bf16"}:
        raise UnusableError(f"precision {precision!r} is ambiguous")
    work = _mixed_work(row, sequence, folder)
    year = _YEARS.get(name.split("-")[0], 2025.3)
    overlapped = row["VPP"] == "DualPipe"
    stages = int(row["PP"] or 1)
    data = ranks / (stages * int(row["TP"] or 1) * int(row["CP"] or 1))
    if not row["VPP"] and (stages - 1) / (batch / data) > _MOST_BUBBLE:
        raise UnusableError(
            "virtual stages are not stated, and without any the bubble would be a large part of the step"
        )
    for recompute, seconds, stated, sharded in _timings(row, work, ranks, batch * sequence):
        job = Job(
            work=work,
            chip=chip(_CHIPS[row["chip"]]),
            ranks=ranks,
            sequence=sequence,
            global_batch=batch,
            micro_batch=int(row["MBS"] or 1),
            tensor=int(row["TP"] or 1),
            context=int(row["CP"] or 1),
            pipeline=int(row["PP"] or 1),
            virtual=int(row["VPP"]) if row["VPP"] and not overlapped else 1,
            expert=int(row["EP"] or 1),
            shard_parameters=sharded,
            recompute=recompute,
            precision=_PRECISIONS.get(precision, "bf16"),
            overlapped_bubble=overlapped,
            **asdict(_mixed_software(row, overlapped)),
            unfused_attention=year < _FUSED_SINCE,
        )
        yield _checked(f"{label} {name} {recompute}", _group(name), job, seconds, stated)


def _group(name: str) -> str:
    source = name.split("-", maxsplit=1)[0]
    return {"v4flash": "v4", "v4pro": "v4", "dsv3": "dsv3 cards"}.get(source, source)


def _mixed_work(row: dict[str, str], sequence: int, folder: Path | None) -> Work:
    model = row["model"]
    if model.startswith("DeepSeek-V4"):
        return family_work("v4-" + model.rsplit("-", 1)[1].lower(), sequence)
    if model == "DeepSeek-V3":
        return family_work("deepseek-v3", sequence)
    if model.startswith("Llama-3.1 405B"):
        return family_work("llama3-405b", sequence)
    if model.startswith("GPT"):
        hidden = int(_number(row["hidden"], "the width"))
        if hidden not in _GPT_HEADS:
            raise UnusableError(f"the number of heads of a GPT {hidden} wide is not known")
        return work_of(_gpt(int(row["layers"]), hidden, _GPT_HEADS[hidden]), sequence)
    return _own_work(folder, model, sequence)


def _timings(
    row: dict[str, str], work: Work, ranks: int, tokens: int
) -> Iterator[tuple[Recompute, float, float | None, bool]]:
    """(recompute, seconds of a step, TFLOP/s a chip that the row states, whether parameters are gathered)."""
    if "Ascend" in row["chip"]:
        share = float(row["MFU_reported"].split("%")[0]) / 100
        stated: float | None = share * chip("ascend-910c").bf16_tflops
        yield "full", tokens / (_number(row["tok_s_per_chip"], "tokens/s") * ranks), stated, True
        return
    policy: Recompute = "full" if row["recompute/offload"].startswith("full") else "none"
    if "selective" in row["recompute/offload"] or "mlp" in row["recompute/offload"]:
        policy = "selective"
    if " / " in row["step_s"]:
        full, selective = (float(x) for x in row["step_s"].split(" / "))
        yield "full", full, None, False
        yield "none", selective, None, False
        return
    stated = None
    if row["TFLOPS_per_chip"] and not row["id"].startswith("mlm21"):
        stated = _number(row["TFLOPS_per_chip"], "FLOP/s")
    if row["step_s"]:
        yield policy, _number(row["step_s"], "the step time"), stated or _megascale(row), False
    elif row["tok_s_per_chip"]:
        yield policy, tokens / (_number(row["tok_s_per_chip"], "tokens/s") * ranks), stated, False
    elif row["id"].startswith("mlm21"):
        # its FLOP/s count the forward pass twice, for recomputation
        hardware = 4 / 3 * work.training_flops * tokens
        yield policy, hardware / (_number(row["TFLOPS_per_chip"], "FLOP/s") * 1e12 * ranks), None, False
    elif stated:
        yield policy, work.training_flops * tokens / (stated * 1e12 * ranks), stated, False
    else:
        raise UnusableError("neither a step time nor a rate is stated")


def _megascale(row: dict[str, str]) -> float | None:
    """TFLOP/s a chip by its MFU, of a row that states step time and MFU."""
    if not row["MFU_reported"]:
        return None
    peak = chip(_CHIPS[row["chip"]]).bf16_tflops
    return float(row["MFU_reported"].split("%")[0]) / 100 * peak


def _torchtitan(row: dict[str, str], label: str) -> Case:
    """Rows of torchtitan's report say their layout in words."""
    text = row["id"] + " " + row["model"] + " " + row["recompute/offload"]
    if "same" in text:
        text += " FSDP8 TP8 PP8 405B FP8 LBS32 full AC"
    size = {k: int(m[1]) for k in ("FSDP", "TP", "PP", "CP", "LBS") if (m := re.search(rf"\b{k}(\d+)", text))}
    ranks, sequence = int(row["chips"]), int(row["seq"])
    family = "llama3-405b" if "405B" in text else "llama3-8b"
    if "LBS" not in size or ("+compile8B" in text and "405B" in text):
        raise UnusableError("its layout cannot be read")
    tensor, pipeline, context = size.get("TP", 1), size.get("PP", 1), size.get("CP", 1)
    data = ranks // (tensor * pipeline * context)
    batch = size["LBS"] * data
    job = Job(
        work=family_work(family, sequence),
        chip=chip("h100-500w"),
        ranks=ranks,
        sequence=sequence,
        global_batch=batch,
        micro_batch=size["LBS"] // pipeline,  # its default: as many micro-batches as pipeline ranks
        tensor=tensor,
        context=context,
        pipeline=pipeline,
        virtual=2 if "Interleaved" in text else 1,
        shard_parameters=True,
        recompute="full" if "full AC" in text else "selective",
        precision="fp8" if "FP8" in text.replace("FSDP8", "") else "bf16",
    )
    rate = _number(row["tok_s_per_chip"], "tokens/s")
    return _checked(f"{label} {row['id']}", "torchtitan", job, batch * sequence / rate / ranks, None)
