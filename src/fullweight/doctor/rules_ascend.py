"""Rules over the variables of Ascend: what hides errors, what hangs, what memory and speed pay.

Sources: those of `environment.toml`, and the messages of torch_npu 2.13.0. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fullweight.doctor.environment import value_of, variables
from fullweight.doctor.findings import Finding, Severity
from fullweight.doctor.settings import (
    LONG_SECONDS,
    Environment,
    Rule,
    Setting,
    equals,
    off,
    on,
    slow,
    told_seconds,
)

LARGE_RANKS = 64  # from which analysing timeouts may hang a job
_ERROR, _WARNING, _NOTE = Severity.error, Severity.warning, Severity.note


# ---- what hides errors ----------------------------------------------------------------------------------------


def _saturation(environment: Environment, _: Setting) -> Iterator[Finding]:
    mend = {"INF_NAN_MODE_ENABLE": "1", "INF_NAN_MODE_FORCE_DISABLE": ""}
    for name, bad in (("INF_NAN_MODE_ENABLE", "0"), ("INF_NAN_MODE_FORCE_DISABLE", "1")):
        if environment.get(name) == bad:
            yield Finding(
                _ERROR,
                name,
                f"{bad}: NaN becomes 0 and Inf the largest number",
                "IEEE Inf and NaN",
                "a diverging run would look healthy; use INF_NAN_MODE_ENABLE=1 alone",
                mend,
            )


def _fallback(environment: Environment, _: Setting) -> Iterator[Finding]:
    name = "TORCH_NPU_FALLBACK_CPU_DISABLE"
    if off(environment, name):
        yield Finding(
            _WARNING,
            name,
            environment.get(name) or "unset (0)",
            "1",
            "an operation without an NPU kernel runs on the CPU, silently and slowly; set it before Python starts",
            {name: "1"},
        )


def _corruption(environment: Environment, _: Setting) -> Iterator[Finding]:
    name = "NPU_ASD_CONFIG"
    options = dict(o.split(":", 1) for o in value_of(name, environment).split(",") if ":" in o)
    if options.get("enable", "false").casefold() != "true":
        yield Finding(
            _NOTE,
            name,
            "detection of silent data corruption off",
            "on for long runs",
            "costs about 2 % and up to 1.5 GB; set enable:true,with_checksum:true to have it",
        )


# ---- what hangs -----------------------------------------------------------------------------------------------


def _seconds(environment: Environment, name: str) -> float | None:
    """The timeout in seconds, infinity for 0; None when it is not a number (told by `_values`)."""
    try:
        value = float(value_of(name, environment))
    except ValueError:
        return None
    return value if value > 0 else float("inf")


def _timeouts(environment: Environment, setting: Setting) -> Iterator[Finding]:
    event, execute = (_seconds(environment, n) for n in ("HCCL_EVENT_TIMEOUT", "HCCL_EXEC_TIMEOUT"))
    connect = _seconds(environment, "HCCL_CONNECT_TIMEOUT")
    if event is None or execute is None or connect is None:
        return
    if event <= execute and event != float("inf"):
        yield Finding(
            _ERROR,
            "HCCL_EVENT_TIMEOUT",
            f"{event:.0f} s, HCCL_EXEC_TIMEOUT {told_seconds(execute)}",
            "more than HCCL_EXEC_TIMEOUT",
            "the stream gives up before the collective can say who is missing; raise it, or lower the other",
            {"HCCL_EVENT_TIMEOUT": f"{execute + 64:.0f}"} if execute <= LONG_SECONDS - 64 else _defaults(),
        )
    group = setting.group_timeout_seconds
    for name, seconds in (("HCCL_EXEC_TIMEOUT", execute), ("HCCL_CONNECT_TIMEOUT", connect)):
        if group is not None and setting.ranks > 1 and group <= seconds:
            yield Finding(
                _WARNING,
                name,
                f"{told_seconds(seconds)}, process group {group:.0f} s",
                f"less than the process group's timeout ({group:.0f} s)",
                "the group ends the job before HCCL can say why; lower it, or raise launch.setup_seconds",
                {name: variables()[name].default} if int(variables()[name].default) < group else {},
            )
    if connect >= execute:
        yield Finding(
            _NOTE,
            "HCCL_CONNECT_TIMEOUT",
            f"{told_seconds(connect)}, HCCL_EXEC_TIMEOUT {told_seconds(execute)}",
            "less than HCCL_EXEC_TIMEOUT",
            "else it is hard to tell whether this rank or another was stuck",
        )
    yield from _long_timeouts(environment, setting)


def _defaults() -> dict[str, str]:
    return {name: variables()[name].default for name in ("HCCL_EVENT_TIMEOUT", "HCCL_EXEC_TIMEOUT")}


def _long_timeouts(environment: Environment, _: Setting) -> Iterator[Finding]:
    for name in ("HCCL_EXEC_TIMEOUT", "HCCL_EVENT_TIMEOUT", "ACL_DEVICE_SYNC_TIMEOUT"):
        seconds = _seconds(environment, name) if value_of(name, environment) else None
        if seconds is not None and seconds > LONG_SECONDS:
            yield Finding(
                _WARNING,
                name,
                told_seconds(seconds),
                f"at most {LONG_SECONDS} s",
                "a hang would hold every device for that long (slow phases have launch.setup_seconds)",
                {name: variables()[name].default} if name.startswith("ACL") else _defaults(),
            )


def _watchdog(environment: Environment, setting: Setting) -> Iterator[Finding]:
    name = "TORCH_HCCL_ASYNC_ERROR_HANDLING"
    old = "HCCL_ASYNC_ERROR_HANDLING"
    value = environment.get(name) or environment.get(old) or variables()[name].default
    retry = "1" in [level.strip()[3:] for level in environment.get("HCCL_OP_RETRY_ENABLE", "").split(",")]
    if value == "0" and retry:
        yield Finding(
            _NOTE,
            name,
            "0, for HCCL_OP_RETRY_ENABLE",
            "0 with retries, 1 without",
            "no watchdog ends a failed collective; fullweight's own watch (launch.stall_seconds) does",
        )
    elif value == "0":
        yield Finding(
            _ERROR,
            name,
            "0: a failed collective ends nothing",
            "1",
            "the other ranks hang until their timeout, or for ever",
            {name: "1", old: ""},
        )
    elif retry:
        yield Finding(
            _WARNING,
            "HCCL_OP_RETRY_ENABLE",
            f"{environment['HCCL_OP_RETRY_ENABLE']} with the watchdog on",
            f"retries, or the watchdog ({name}={value})",
            f"the watchdog ends the process at the link error that a retry would mend; set {name}=0 with retries",
            {name: "0"},
        )
    if on(environment, "TORCH_HCCL_BLOCKING_WAIT") or environment.get("HCCL_BLOCKING_WAIT") == "1":
        yield Finding(
            _WARNING,
            "TORCH_HCCL_BLOCKING_WAIT",
            "1: the host waits for every collective, and there is no watchdog",
            "0",
            "nothing overlaps any more; unset it",
            {"TORCH_HCCL_BLOCKING_WAIT": "0", "HCCL_BLOCKING_WAIT": ""},
        )
    if on(environment, "TORCH_HCCL_DESYNC_DEBUG") or environment.get("HCCL_DESYNC_DEBUG") == "1":
        large = setting.ranks >= LARGE_RANKS
        yield Finding(
            _ERROR if large else _WARNING,
            "TORCH_HCCL_DESYNC_DEBUG",
            f"1 with {setting.ranks} rank(s)",
            "0",
            "the analysis itself can hang a large job; unset it",
            {"TORCH_HCCL_DESYNC_DEBUG": "0", "HCCL_DESYNC_DEBUG": ""},
        )


def _unfolding(environment: Environment, setting: Setting) -> Iterator[Finding]:
    if equals(environment, "HCCL_OP_EXPANSION_MODE", "AIV"):
        yield Finding(
            _ERROR if setting.ranks > 1 else _NOTE,
            "HCCL_OP_EXPANSION_MODE",
            "AIV",
            "AI_CPU",
            "AIV is for inference, and undefined when several groups use it at once, as training does",
            {"HCCL_OP_EXPANSION_MODE": "AI_CPU"},
        )


def _whitelist(environment: Environment, _: Setting) -> Iterator[Finding]:
    if off(environment, "HCCL_WHITELIST_DISABLE") and not environment.get("HCCL_WHITELIST_FILE"):
        yield Finding(
            _ERROR,
            "HCCL_WHITELIST_DISABLE",
            "0 without HCCL_WHITELIST_FILE",
            "1, or a file",
            "no rank may connect to another",
            {"HCCL_WHITELIST_DISABLE": "1"},
        )


# ---- memory ---------------------------------------------------------------------------------------------------

_ALLOCATOR = {
    "max_split_size_mb",
    "garbage_collection_threshold",
    "expandable_segments",
    "base_addr_aligned_kb",
    "page_size",
    "segment_size_mb",
    "large_segment_size_mb",
    "roundup_power2_divisions",
    "multi_stream_lazy_reclaim",
    "pinned_use_background_threads",
    "pin_memory_expandable_segments",
    "pinned_mem_register",
    "per_process_memory_fraction",
    "throw_on_npumalloc_oom",
    "pinned_max_round_threshold_mb",
    "pinned_max_cached_size_mb",
}
_ALLOCATOR_950 = {
    "expandable_segments",
    "pinned_use_background_threads",
    "pin_memory_expandable_segments",
    "pinned_mem_register",
}
_TWO_ALLOCATORS = ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def allocator_options(environment: Environment) -> dict[str, str]:
    """Options of the caching allocator, from whichever variable is set."""
    text = next((environment[n] for n in _TWO_ALLOCATORS if environment.get(n)), "")
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    pairs = (part.strip().partition(":")[::2] for part in parts if ":" in part)
    return dict(pairs)


def _allocator(environment: Environment, setting: Setting) -> Iterator[Finding]:
    name = next((n for n in _TWO_ALLOCATORS if environment.get(n)), _TWO_ALLOCATORS[0])
    if all(environment.get(n) for n in _TWO_ALLOCATORS):
        yield Finding(
            _ERROR,
            _TWO_ALLOCATORS[0],
            "set together with PYTORCH_ALLOC_CONF",
            "one of them",
            "torch_npu ends the process when both are set; keep PYTORCH_ALLOC_CONF",
            {_TWO_ALLOCATORS[0]: ""},
        )
    options = allocator_options(environment)
    for option in sorted(options.keys() - _ALLOCATOR):
        yield Finding(
            _ERROR, name, f"unknown option {option!r}", f"one of {', '.join(sorted(_ALLOCATOR))}", "correct it"
        )
    if "950" in setting.chip:
        for option in sorted(options.keys() & (_ALLOCATOR - _ALLOCATOR_950)):
            yield Finding(
                _ERROR, name, f"{option} on {setting.chip}", ", ".join(sorted(_ALLOCATOR_950)), "remove it"
            )
    for first, second, why in _allocator_conflicts(options):
        yield Finding(_ERROR, name, f"{first} with {second}", "one of them", why)
    if "page_size" in options and len(options) > 1:
        yield Finding(_NOTE, name, "page_size with other options", "page_size alone", "only page_size is in force")


def _allocator_conflicts(options: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    growing = options.get("expandable_segments", "").casefold() == "true"
    for other in ("max_split_size_mb", "garbage_collection_threshold"):
        if growing and other in options:
            yield "expandable_segments:True", other, "the allocator refuses both; remove one"
    if options.get("pin_memory_expandable_segments", "").casefold() == "true" and "pinned_mem_register" in options:
        yield (
            "pin_memory_expandable_segments:True",
            "pinned_mem_register",
            "they cannot be set together; remove one",
        )
    split, large = options.get("max_split_size_mb", ""), options.get("large_segment_size_mb", "")
    if split.isdigit() and large.isdigit() and int(split) < int(large):
        fix = f"max_split_size_mb must be at least large_segment_size_mb ({large})"
        yield f"max_split_size_mb:{split}", f"large_segment_size_mb:{large}", fix


def _memory(environment: Environment, _: Setting) -> Iterator[Finding]:
    growing = allocator_options(environment).get("expandable_segments", "").casefold() == "true"
    if on(environment, "TORCH_HCCL_ZERO_COPY") and not growing:
        yield Finding(
            _ERROR,
            "TORCH_HCCL_ZERO_COPY",
            "1 without expandable_segments:True",
            "both, or 0",
            "set PYTORCH_NPU_ALLOC_CONF=expandable_segments:True, or leave it off (it is experimental)",
            {"TORCH_HCCL_ZERO_COPY": "0"},
        )
    if environment.get("PYTORCH_NO_NPU_MEMORY_CACHING") == "1":
        yield Finding(
            _WARNING,
            "PYTORCH_NO_NPU_MEMORY_CACHING",
            "1: every tensor is allocated by the driver",
            "unset",
            "very slow, and expandable segments are off; unset it after debugging",
            {"PYTORCH_NO_NPU_MEMORY_CACHING": ""},
        )
    if equals(environment, "MULTI_STREAM_MEMORY_REUSE", "0"):
        yield Finding(
            _NOTE, "MULTI_STREAM_MEMORY_REUSE", "0", "2", "memory of collectives is freed late: a higher peak"
        )
    if equals(environment, "TASK_QUEUE_ENABLE", "2"):
        yield Finding(
            _NOTE,
            "TASK_QUEUE_ENABLE",
            "2",
            "1, where memory is short",
            "faster launches, and a higher peak of memory",
        )


# ---- speed, records -------------------------------------------------------------------------------------------


def _slow(environment: Environment, _: Setting) -> Iterator[Finding]:
    if on(environment, "ASCEND_LAUNCH_BLOCKING"):
        yield slow("ASCEND_LAUNCH_BLOCKING", "1", "0", "each operation is waited for; unset it after debugging")
    elif equals(environment, "TASK_QUEUE_ENABLE", "0"):
        yield slow("TASK_QUEUE_ENABLE", "0", "1", "launches are not queued; set it to 1")
    if equals(environment, "ASCEND_GLOBAL_LOG_LEVEL", "0", "1"):
        level = environment["ASCEND_GLOBAL_LOG_LEVEL"]
        yield slow("ASCEND_GLOBAL_LOG_LEVEL", level, "3", "logs slow the run and fill the disk; set it to 3")
    for name in (
        "ATB_STREAM_SYNC_EVERY_KERNEL_ENABLE",
        "ATB_STREAM_SYNC_EVERY_RUNNER_ENABLE",
        "ATB_STREAM_SYNC_EVERY_OPERATION_ENABLE",
        "TORCH_NPU_SANITIZER",
    ):
        if on(environment, name):
            yield slow(name, "1", "0", "a debugging aid; unset it")
    for name in ("HCCL_DIAGNOSE_ENABLE", "HCCL_ENTRY_LOG_ENABLE"):
        if on(environment, name):
            yield Finding(_NOTE, name, "1", "0", "slows collectives a little; unset it after debugging")


def _affinity(environment: Environment, _: Setting) -> Iterator[Finding]:
    value = value_of("CPU_AFFINITY_CONF", environment)
    if value.startswith("0"):
        yield Finding(
            _NOTE,
            "CPU_AFFINITY_CONF",
            "threads not bound to cores",
            "1 or 2",
            "set 1: ranks then stay on their cores",
        )
    if "npu_affine:1" in value:
        yield Finding(
            _NOTE, "CPU_AFFINITY_CONF", "npu_affine:1", "910B only", "on other chips it has no effect; give ranges"
        )


def _recorder(environment: Environment, _: Setting) -> Iterator[Finding]:
    size = value_of("TORCH_HCCL_TRACE_BUFFER_SIZE", environment)
    if on(environment, "TORCH_HCCL_DUMP_ON_TIMEOUT") and (not size.lstrip("-").isdigit() or int(size) <= 0):
        yield Finding(
            _WARNING,
            "TORCH_HCCL_DUMP_ON_TIMEOUT",
            "1 without TORCH_HCCL_TRACE_BUFFER_SIZE",
            "both",
            "the dump would be empty; set TORCH_HCCL_TRACE_BUFFER_SIZE=2000",
            {"TORCH_HCCL_TRACE_BUFFER_SIZE": "2000"},
        )
    for name, needs in (
        ("TORCH_HCCL_HEARTBEAT_TIMEOUT_SEC", "TORCH_HCCL_ENABLE_MONITORING"),
        ("TORCH_HCCL_STATUS_SAVE_PATH", "TORCH_HCCL_STATUS_SAVE_ENABLE"),
        ("TORCH_HCCL_RANKS_PER_ROOT", "ROOTINFO_SCALABLE_ENABLE"),
    ):
        if environment.get(name) and off(environment, needs):
            yield Finding(_NOTE, name, f"set without {needs}=1", "both", "it has no effect")
    if environment.get("HCCL_OP_RETRY_PARAMS") and "1" not in environment.get("HCCL_OP_RETRY_ENABLE", "")[3:]:
        yield Finding(
            _NOTE, "HCCL_OP_RETRY_PARAMS", "set without HCCL_OP_RETRY_ENABLE", "both", "it has no effect"
        )


def _repeating(environment: Environment, setting: Setting) -> Iterator[Finding]:
    name = "HCCL_DETERMINISTIC"
    if setting.deterministic and setting.ranks > 1 and off(environment, name):
        yield Finding(
            _ERROR,
            name,
            environment.get(name) or "unset (false)",
            "true, for parallel.deterministic = true",
            "reductions between ranks may add in another order each time",
            {name: "true"},
        )
    if setting.deterministic and environment.get("ATB_MATMUL_SHUFFLE_K_ENABLE") == "1":
        mend = {"ATB_MATMUL_SHUFFLE_K_ENABLE": "0"}
        yield Finding(
            _ERROR, "ATB_MATMUL_SHUFFLE_K_ENABLE", "1", "0, for parallel.deterministic = true", "sums vary", mend
        )
    if equals(environment, name, "strict") and equals(environment, "HCCL_INTER_HCCS_DISABLE", "TRUE"):
        yield Finding(
            _ERROR,
            name,
            "strict with HCCL_INTER_HCCS_DISABLE=TRUE",
            "one of them",
            "strict order is not supported over RoCE inside a super node; use true",
            {name: "true"},
        )


RULES: tuple[Rule, ...] = (
    _saturation,
    _fallback,
    _corruption,
    _timeouts,
    _watchdog,
    _unfolding,
    _whitelist,
    _allocator,
    _memory,
    _slow,
    _affinity,
    _recorder,
    _repeating,
)
