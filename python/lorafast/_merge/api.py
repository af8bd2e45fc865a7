"""Merging adapters into a checkpoint, planning, proving and undoing it: the public functions."""

# Annotations are evaluated here, as the flags are read from them.
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from lorafast._merge.options import ExecutionOptions, StoreOptions
from lorafast._merge.plan import make_plan
from lorafast._options import Flag, Option, options_in, pick
from lorafast._seeds import checked_seed
from lorafast._types import (
    AdapterFormat,
    Compat,
    CredentialProvider,
    ExecutorChoice,
    ExpertLayout,
    MergePrecision,
    Progress,
    Source,
    StorageOptions,
    Strategy,
    TokenizerChoice,
    Weight,
)
from lorafast._weights import plain_weight, weight_of

if TYPE_CHECKING:
    from lorafast._merge.plan import MergePlan
    from lorafast._merge.report import MergeReport
    from lorafast._merge.subtract import SubtractReport
    from lorafast._merge.verify import Verification
    from lorafast._merge.view import MergedView
    from lorafast._merge.view_tensors import Framework

#: What merges adapters, or tells of a merge.
Verb = Literal["plan", "merge", "verify", "subtract"]

#: What `dtype` may be, and the name of each in a safetensors header.
DTYPES: dict[str, str | None] = {
    "auto": None,
    "float16": "F16",
    "fp16": "F16",
    "bfloat16": "BF16",
    "bf16": "BF16",
    "float32": "F32",
    "fp32": "F32",
}


class MergeOptions(NamedTuple):
    """What a merge is: how adapters are combined, and what the output is."""

    strategy: Annotated[
        Strategy | None,
        Flag(
            "sequential: each adapter at its full scale; weighted: each times its weight; "
            "average: each times 1/N; slerp, karcher and others: with coefficients of each tensor; "
            "ties, dare_linear and others: element by element (default: weighted where weights are "
            "given, else sequential)",
            metavar="NAME",
            older_name="merge-strategy",
        ),
    ] = None
    strategy_options: Annotated[
        Mapping[str, float] | None,
        Flag(
            "what the strategy takes, such as density=0.5 (ties) or t=0.3 (slerp); again for each "
            "other",
            metavar="KEY=VALUE",
            name="strategy-option",
        ),
    ] = None
    seed: Annotated[
        int,
        Flag(
            "what the random masks of DARE and DELLA depend on, beside names and places "
            "(default: %(default)s)",
            metavar="N",
        ),
    ] = 0
    weights: Annotated[
        Sequence[Weight] | None,
        Flag(
            "a weight for each adapter, in their order, or behind each (style:0.7); negative ones "
            "subtract; PATTERN=NUMBER,… weighs by module names (*.q_proj=0.5,*=1)",
            metavar="W",
            check=weight_of,
            short="w",
        ),
    ] = None
    dtype: Annotated[
        str,
        Flag(
            "what to write the floating-point tensors as; auto keeps the base's "
            "(default: %(default)s)",
            verbs=("plan", "merge", "subtract"),
            choices=tuple(DTYPES),
            other_help={
                "subtract": "what to write the floating-point tensors as (default: %(default)s)"
            },
            older_name="merge-dtype",
        ),
    ] = "auto"
    allow: Annotated[
        str | Sequence[str],
        Flag(
            "what to merge without: unknown fields of an adapter's config that do not change the "
            "result, and files of weights beside the adapter's own",
            metavar="NAME",
        ),
    ] = ()
    compat: Annotated[
        Compat | None,
        Flag(
            "peft: the result of PEFT's own merge where that is not what was trained (tied "
            "embeddings, replicated layers)"
        ),
    ] = None
    precision: Annotated[
        MergePrecision,
        Flag(
            "default: sums in float32, rounded once; exact: the real number that the files say, "
            "rounded once, the same bytes on every machine and device (default: %(default)s)",
            verbs=("plan", "merge", "verify"),
        ),
    ] = "default"
    expert_layout: Annotated[
        ExpertLayout,
        Flag(
            "how factors of experts stored as one tensor lie on it, where neither shapes nor "
            "versions tell (default: %(default)s)"
        ),
    ] = "auto"

    tokenizer: Annotated[
        TokenizerChoice,
        Flag(
            "whose tokenizer and chat template the output has: the adapter's, the base's, or auto, "
            "the adapter's where its tokens are not the base's and the merged embeddings have them "
            "all (default: %(default)s)",
            verbs=("plan", "merge"),
        ),
    ] = "auto"

    format: Annotated[
        AdapterFormat | None,
        Flag("the adapters' format, where their files do not tell it (default: told by the files)"),
    ] = None
    revision: Annotated[
        str | None,
        Flag(
            "the branch, tag or commit of a base on the hub (default: its main branch, or what an "
            "adapter names that names the base)",
            verbs=("plan", "merge", "verify"),
            metavar="REV",
        ),
    ] = None

    def to_core(self) -> dict[str, Any]:
        """What crosses to the core.

        Raises:
            TypeError: the seed is no whole number.
            ValueError: there is no such dtype, or the seed is out of range.
        """
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; there are {', '.join(DTYPES)}")
        implied = "sequential" if self.weights is None else "weighted"
        # These are of the sources, which are found before.
        of_sources = ("format", "revision")
        own = {name: value for name, value in self._asdict().items() if name not in of_sources}
        return {
            **own,
            "strategy": implied if self.strategy is None else self.strategy,
            "weights": None
            if self.weights is None
            else [plain_weight(each) for each in self.weights],
            "seed": checked_seed(self.seed),
            "strategy_options": dict(self.strategy_options or {}),
            "dtype": DTYPES[self.dtype],
            "allow": [self.allow] if isinstance(self.allow, str) else list(self.allow),
            "expert_layout": None if self.expert_layout == "auto" else self.expert_layout,
        }


def options_of(verb: Verb) -> Iterator[Option]:
    """The options that a verb takes, in the order of its help."""
    return options_in(MergeOptions, ExecutionOptions, StoreOptions, verb=verb)


# The keywords of each function are the options that its verb has in these tables, written out for
# readers and type checkers; they are gathered into one object at once.


def merge(
    base: Source | None,
    adapters: Source | Sequence[Source],
    output: Source,
    *,
    strategy: Strategy | None = None,
    weights: Sequence[Weight] | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = False,
    device_memory: int | str | None = None,
    allow: str | Sequence[str] = (),
    compat: Compat | None = None,
    precision: MergePrecision = "default",
    expert_layout: ExpertLayout = "auto",
    verify: bool = False,
    report: bool = True,
    sync: bool = True,
    tokenizer: TokenizerChoice = "auto",
    strategy_options: Mapping[str, float] | None = None,
    seed: int = 0,
    format: AdapterFormat | None = None,
    storage_options: StorageOptions | None = None,
    credential_provider: CredentialProvider | None = None,
    io_memory: int | str | None = None,
    revision: str | None = None,
    private: bool = False,
    pull_request: bool = False,
    executor: ExecutorChoice | None = None,
) -> "MergeReport":
    """Merges one or many LoRA adapters into a checkpoint and writes the result.

    For every weight W that an adapter updates, the output holds W + Σ wᵢ·sᵢ·Bᵢ·Aᵢ, computed in
    float32 (float64 for float64 weights) and rounded once to the output's dtype, where s is α/r
    (Hu et al. 2021, arXiv:2106.09685, §4.1) or α/√r for rsLoRA (Kalajdzievski 2023,
    arXiv:2312.03732). All other tensors and files are carried over. The output becomes a model
    only at the end; whatever fails leaves it as it was.

    Args:
        base: a directory with `model.safetensors` or with shards and their index, a pipeline of
            diffusers (its directory: `unet.` or `text_encoder.` before a name is its folder) or
            one of its components' directories, a single `.safetensors` file, or an id on the hub
            (`owner/name[@revision][/sub/folder]`, with or without `hf://`). Of a pipeline only the
            components that an adapter changes are written anew. `None`: the model that the
            adapters' own configs name (`base_model_name_or_path`, and `revision`), which is said
            on stderr and in the report's notes.
        adapters: one or several adapters, in any format that is read: directories, files or hub
            ids.
        output: the directory to write. Absent or empty, unless `overwrite`. Or a place on the hub,
            `hf://owner/name[@branch][/sub/folder]`: what is written into a temporary directory
            is then sent there, as one commit.
        strategy: "sequential" adds every adapter at its full scale, "weighted" multiplies each by
            its weight, "average" by 1/N; `None` is weighted where weights are given, and sequential
            where none are. "linear", "normalized" (by the sum of the weights) and "centroid" are
            such sums; "slerp", "nuslerp", "karcher", "multislerp", "model_stock" and "projection"
            find the coefficients of every tensor from inner products of the updates. "ties",
            "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties",
            "magnitude_prune" and "sce" merge the products sᵢ·Bᵢ·Aᵢ of every tensor element by
            element and add the result. `docs/strategies.md` defines them. PEFT's names for the same
            are understood.
        strategy_options: what such a strategy takes, by name: "lambda" (a factor on the result),
            "t" (slerp), "max_iter" and "tol" (karcher), "eps" (multislerp), "density" (the share
            that is kept, 1 if missing), "epsilon" (DELLA), "gamma" (breadcrumbs), "select_topk"
            (SCE), "normalize" (whether the sum over those that agree is divided by their weights;
            it is unless false).
        seed: what the masks of DARE and DELLA depend on, beside each adapter's position, the
            module's name and the element's place.
        weights: for "weighted" and the strategies that take weights, one of each adapter; all 1 if
            missing. A weight is a finite number, negative ones too where nothing is divided by
            their sum, or a mapping from patterns of module names ("*.q_proj") to numbers, of which
            the first that fits counts, and 1 where none does.
        dtype: "auto" keeps each tensor's; "float16", "bfloat16", "float32" (or "fp16", "bf16",
            "fp32") convert every floating-point tensor of 16 bits and more (in a pipeline those of
            the components that an adapter changes), and write quantised weights out, without their
            scales and without the config's entry on quantisation; under "auto" what changes of them
            is quantised again with the same scheme.
        device: where products are made. "cpu": by the core. "cpu:amx": by the core, for 16-bit
            weights in tiles of bf16 where the processor has AMX; float32 factors are split in two
            for it, and most products are off by up to 2⁻¹⁵ of their size before the one rounding,
            so some weights differ in the last place. Never timed: no such processor was at hand.
            "cuda" or "cuda:N": by torch on that
            device; results are within a unit in the last place of the CPU's, not the same bytes.
            "auto": on CUDA if a device is there and sending the weights costs less time than the
            products save, else on the CPU; the report's notes say which and why. "torch:cpu": by
            torch on the CPU, to compare backends. Quantised weights are always merged on the CPU.
        device_memory: the most of the device's memory to use: bytes, or a text such as "2GiB";
            most of what is free if missing. cuBLAS's workspace is part of it (torch's default is
            32 MiB on Hopper and newer and 8 MiB before; see CUBLAS_WORKSPACE_CONFIG), CUDA's own
            context is not. What does not fit is merged on the CPU.
        threads: worker threads; one per core if missing. The result does not depend on it.
        overwrite: replace a model in `output`: what its manifest or index lists, and files that
            only models have. Whatever else lies there stays, weights with a warning; an adapter
            there is an error. The older model is deleted when the new one is in its place, and is
            back in its place where that fails. Shards that would become the same again, by the
            recipes in its `merge_report.json`, stay the files that they are; one that anybody
            touched since, or whose base or factors changed, is written anew.
        progress: `True` draws a bar on a terminal or in a notebook, and elsewhere writes a line
            every ten seconds; a callable is called with the bytes done and the bytes in all.
        allow: what to merge without, by name: fields of an adapter's config that are unknown and
            known not to change the result, and files of weights in its directory beside its own
            (`value_head.bin`), which would else be left out silently and are refused.
        compat: "peft" gives what PEFT's `merge_and_unload` gives where that is not what was
            trained: an update of one of two tied layers changes both, replicated layers gather
            every replica's updates. The
            default is what the adapters were trained to be.
        precision: "default" sums in float32 (float64 for float64 weights) and rounds once. "exact"
            makes of every merged weight the real number W + Σ wᵢ·sᵢ·(BᵢAᵢ), with every stored
            number and each wᵢ and sᵢ as the float64 that it is, rounded once to the output's dtype,
            to nearest even: the same bytes whatever computes them. What is no such sum (DoRA,
            PiSSA, strategies that look at values, weights that are quantised again) is refused by
            name. `docs/exact.md` says how.
        expert_layout: how factors of experts that are stored as one tensor lie on it, where
            neither shapes nor PEFT's version tell: "straight" (as B·A) or "transposed".
        verify: read the result back and prove it, as `lorafast.verify` does, before it becomes a
            model.
        report: write `merge_report.json` and `merge_report.md` beside the model, and a card
            (`README.md`); the base's is kept as `README.base.md`. Without, no shard is reused.
        sync: return when the output has reached the disk. `False` leaves the time to the system,
            as `cp` does; a loss of power soon after can then take the model with it.
        tokenizer: whose tokenizer and chat template the output has. "auto": an adapter's where its
            tokens are not the base's and the merged embeddings have a row for each, of several
            adapters that one's which brought rows; else the base's, with a warning of what an
            adapter's does in another way. "base" and "adapter" decide.
        format: the format of all adapters, where their files do not tell it: keys in the names of
            several formats, weights that were put together. `None` tells it by the files.
        storage_options: what object stores need to know where URLs (`s3://`, `gs://`, `az://`,
            `http://`, `https://`) name base, adapters or output: `object_store`'s keys with their
            values, or from the beginnings of URLs to such, the longest of which counts. The
            environment's variables stand below them.
        credential_provider: called without arguments, gives such keys and the second (since 1970)
            at which they expire, or `None`; it is asked again before that.
        io_memory: what reads ahead and uploads take of memory together: bytes, or a text such as
            "256MiB"; 128 MiB if missing.
        revision: the branch, tag or commit of a base on the hub, where its id names none.
        private: of an output on the hub: make its repository, if it is not there, a private one.
        pull_request: of an output on the hub: open a pull request, in place of a commit to the
            main branch.
        executor: who writes the shards, each of them a task: an executor of `concurrent.futures`
            (process pools, Dask's `client.get_executor()`, loky's), "ray" for Ray's cluster, or
            "processes" or "processes:N" for a pool of this machine. The bytes are the same; each
            task has `threads` threads, 1 if missing. All workers have to see base, adapters and
            the output's directory under the same paths. What is written before something breaks
            lies in `.NAME.parts` beside the output, and the same call again does the rest.

    Returns:
        What was done, with the digests of what it was done from.

    Raises:
        FileNotFoundError: base or adapter is not there, and not on the hub either.
        ValueError: an argument is outside its domain.
        CheckpointError: the base is broken.
        AdapterError: an adapter is broken, or (UnsupportedAdapterError) cannot be merged.
        PlanError: base and adapters do not fit together.
        OutputError: the output may not or cannot be written.
        NumericError: a finite weight would become NaN or infinite.
        StoreError: an object store refuses, or cannot be reached.
        DeviceError: the device (or AMX) is not there, or this torch cannot use it.
        MissingDependencyError: torch is needed for the device and is not installed.
        VerificationError: with `verify`, what was written reads back as something else; there is no
            model then.
        WorkerError: a worker of the executor died.
    """
    arguments = locals()
    options, execution = pick(MergeOptions, arguments), pick(ExecutionOptions, arguments)
    execution.memory()
    with _stores(arguments):
        return make_plan(base, adapters, options, device=device).carry_out(output, execution)


def _stores(arguments: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Within it, URLs are opened as a function's arguments say."""
    from lorafast._io.stores import using

    return using(pick(StoreOptions, arguments).settings())


def plan(
    base: Source | None,
    adapters: Source | Sequence[Source],
    *,
    strategy: Strategy | None = None,
    weights: Sequence[Weight] | None = None,
    dtype: str = "auto",
    allow: str | Sequence[str] = (),
    compat: Compat | None = None,
    precision: MergePrecision = "default",
    expert_layout: ExpertLayout = "auto",
    tokenizer: TokenizerChoice = "auto",
    strategy_options: Mapping[str, float] | None = None,
    seed: int = 0,
    format: AdapterFormat | None = None,
    storage_options: StorageOptions | None = None,
    credential_provider: CredentialProvider | None = None,
    io_memory: int | str | None = None,
    revision: str | None = None,
) -> "MergePlan":
    """Decides what a merge will do, and raises whatever can be known before writing.

    Arguments and exceptions are those of `lorafast.merge`.
    """
    arguments = locals()
    with _stores(arguments):
        return make_plan(base, adapters, pick(MergeOptions, arguments))


def open_merged(
    base: Source | None,
    adapters: Source | Sequence[Source],
    *,
    framework: "Framework" = "pt",
    threads: int | None = None,
    strategy: Strategy | None = None,
    weights: Sequence[Weight] | None = None,
    dtype: str = "auto",
    allow: str | Sequence[str] = (),
    compat: Compat | None = None,
    precision: MergePrecision = "default",
    expert_layout: ExpertLayout = "auto",
    tokenizer: TokenizerChoice = "auto",
    strategy_options: Mapping[str, float] | None = None,
    seed: int = 0,
    format: AdapterFormat | None = None,
    revision: str | None = None,
    storage_options: StorageOptions | None = None,
    credential_provider: CredentialProvider | None = None,
    io_memory: int | str | None = None,
) -> "MergedView":
    """Opens a merge that writes nothing, as `safetensors.safe_open` opens a file.

    Headers are read and the merge is planned; a tensor is computed when it is asked for. Its bytes
    are those that `lorafast.merge` with the same arguments writes under its name, whatever the
    strategy, and of quantised weights codes and scales, too. What is in memory is the tensor that
    was asked for. The base's and the adapters' files must stay as they are until the view is
    closed.

    ```python
    with lorafast.open_merged("llama", "adapter") as merged:
        weight = merged.get_tensor("model.norm.weight")
        rows = merged.get_slice("model.embed_tokens.weight")[:100]
        model.load_state_dict(dict(merged.items()))
        for name, tensor in merged.swap("other-adapter"):
            ...
    ```

    Args:
        base: as for `lorafast.merge`.
        adapters: likewise; with none, `[]`, the view is of the base, into which `swap` puts some.
        framework: what tensors are of: "pt" (torch, on the CPU) or "numpy", which has bfloat16
            where the package ml_dtypes is installed.
        threads: that compute a tensor together, and those of `items()`; one per core if missing.
        strategy: as for `lorafast.merge`, as all that follow.
        weights: likewise.
        dtype: likewise.
        allow: likewise.
        compat: likewise.
        precision: likewise.
        expert_layout: likewise.
        tokenizer: likewise; a view has no files beside the weights.
        strategy_options: likewise.
        seed: likewise.
        format: likewise.
        revision: likewise.
        storage_options: likewise.
        credential_provider: likewise.
        io_memory: likewise.

    Returns:
        The view, to be used in a `with` statement.

    Raises:
        MissingDependencyError: the framework is not installed.
        ValueError: an argument is outside its domain.
        LorafastError: as for `lorafast.plan`.
    """
    arguments = locals()
    from lorafast._merge.view import MergedView

    options = pick(MergeOptions, arguments)
    with _stores(arguments):
        return MergedView(base, adapters, options, framework=framework, threads=threads)


def verify(
    base: Source | None,
    adapters: Source | Sequence[Source],
    merged: Source,
    *,
    strategy: Strategy | None = None,
    weights: Sequence[Weight] | None = None,
    full: bool = False,
    digests: bool = False,
    threads: int | None = None,
    progress: Progress = False,
    allow: str | Sequence[str] = (),
    compat: Compat | None = None,
    precision: MergePrecision = "default",
    expert_layout: ExpertLayout = "auto",
    device: str = "cpu",
    strategy_options: Mapping[str, float] | None = None,
    seed: int = 0,
    format: AdapterFormat | None = None,
    storage_options: StorageOptions | None = None,
    credential_provider: CredentialProvider | None = None,
    io_memory: int | str | None = None,
    revision: str | None = None,
    executor: ExecutorChoice | None = None,
) -> "Verification":
    """Checks a merged checkpoint, whoever made it, against what base and adapters make.

    Tensors that no adapter touches must be the base's, byte for byte. Every merged weight is
    computed again, and must lie within half a unit in the last place of its dtype around the
    exact value, widened by the bound on a float32 sum (n·2⁻²⁴·Σ|terms|; Higham, "Accuracy and
    Stability of Numerical Algorithms", §3.1), so that any order of summation passes. Index,
    config and tied weights must agree with the tensors. How the checkpoint is cut into shards does
    not matter, nor does a prefix before all names, nor whether a tied head is written out. A merged
    checkpoint in another dtype than the base's is held against its own dtype.

    Args:
        base: as for `lorafast.merge`.
        adapters: as for `lorafast.merge`.
        merged: the merged checkpoint: a directory or a `.safetensors` file.
        strategy: how the adapters were combined.
        strategy_options: what the strategy was given.
        seed: that of the merge.
        weights: the adapters' weights, where the strategy takes any.
        full: compute every row of the merged tensors in float64 as well, not a seeded sample.
        threads: worker threads; one per core if missing.
        progress: as for `lorafast.merge`.
        allow: as for `lorafast.merge`.
        compat: as for `lorafast.merge`; "peft" for what PEFT itself merged, which also lets pass
            that PEFT rounds 16-bit weights more than once for some layers and several adapters.
        precision: "exact" for a merge that was exact: every byte must then be the right one.
        digests: `merged` is the `merge_report.json` of an exact merge (or a directory that has it):
            what base and adapters make is computed, and its digests held against those there. The
            merged weights themselves are not looked at, and need not be there.
        expert_layout: as for `lorafast.merge`.
        device: where the merge was made. "cpu:amx" lets pass, for 16-bit weights, what AMX's
            products are off (2⁻¹⁵ of their size); all others are held against the same bound.
        format: as for `lorafast.merge`.
        storage_options: as for `lorafast.merge`.
        credential_provider: as for `lorafast.merge`.
        io_memory: as for `lorafast.merge`.
        revision: as for `lorafast.merge`.
        executor: who looks at the tensors: as for `lorafast.merge`.

    Returns:
        What was found; `.ok` says whether anything is wrong.

    Raises:
        FileNotFoundError: something is not there.
        LorafastError: base or adapters are broken or do not fit together, as for
            `lorafast.merge`. What is wrong with `merged` is a problem in the result instead.
    """
    arguments = locals()
    options, execution = pick(MergeOptions, arguments), pick(ExecutionOptions, arguments)
    from lorafast._io.device_names import check_merge_name
    from lorafast._io.executors import check_executor
    from lorafast._io.limits import check_threads
    from lorafast._io.sources import as_list, require_readers
    from lorafast._merge.verify import verify_plan

    check_threads(threads)
    check_merge_name(device)
    check_executor(executor)
    with _stores(arguments):
        if digests:
            from lorafast._merge.digests import verify_digests

            return verify_digests(base, adapters, merged, options, execution)
        require_readers(base, *as_list(adapters), merged)
        prepared = make_plan(base, adapters, options)
        return verify_plan(prepared, merged, execution, full=full)


def subtract(
    merged: Source,
    adapters: Source | Sequence[Source],
    output: Source,
    *,
    original: Source | None = None,
    strategy: Strategy | None = None,
    weights: Sequence[Weight] | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress = False,
    allow: str | Sequence[str] = (),
    compat: Compat | None = None,
    expert_layout: ExpertLayout = "auto",
    verify: bool = False,
    report: bool = True,
    strategy_options: Mapping[str, float] | None = None,
    seed: int = 0,
    format: AdapterFormat | None = None,
) -> "SubtractReport":
    """Takes adapters out of a merged checkpoint and writes what they were merged into.

    Without `original` every weight M that the adapters changed becomes M - Σ wᵢ·sᵢ·Bᵢ·Aᵢ, computed
    as in a merge and rounded once. The merge had rounded as well, so this is the base to within
    rounding; the result says how far from it at most. What does more than add (DoRA, saved modules
    and biases, trained tokens, starts that change the base) cannot be subtracted.

    With `original` nothing is subtracted: `merged` is proved to be what `original` and the adapters
    make, as `lorafast.verify` does, and then `original` is what is written, byte for byte. If the
    proof fails, nothing is written. This undoes every kind of adapter.

    Args:
        merged: the merged checkpoint, as the base of `lorafast.merge`.
        adapters: what to take out, in the order of the merge.
        output: the directory to write. Absent or empty, unless `overwrite`.
        original: the base that the adapters were merged into, if it is at hand.
        strategy: how the adapters were combined in the merge. One that merges element by element
            can only be undone with `original`.
        strategy_options: what the strategy was given.
        seed: that of the merge.
        weights: their weights in the merge, where the strategy takes any.
        dtype: as for `lorafast.merge`; "auto" keeps that of `merged`, or of `original`.
        overwrite: as for `lorafast.merge`.
        threads: as for `lorafast.merge`.
        progress: as for `lorafast.merge`.
        allow: as for `lorafast.merge`.
        compat: as for `lorafast.merge`; "peft" for what PEFT merged.
        expert_layout: as for `lorafast.merge`.
        verify: read the result back and prove it.
        report: write `subtract_report.json` and `subtract_report.md` beside the model.
        format: as for `lorafast.merge`.

    Returns:
        What was done, and how near to the base the result is.

    Raises:
        FileNotFoundError: something is not there.
        ValueError: an argument is outside its domain.
        CheckpointError: `merged` or `original` is broken.
        AdapterError: an adapter is broken, or (UnsupportedAdapterError) could not have been merged.
        PlanError: the adapters do not fit, or cannot be subtracted without `original`.
        OutputError: the output may not or cannot be written.
        NumericError: a finite weight would become NaN or infinite.
        VerificationError: `merged` is not what `original` and the adapters make; or, with `verify`,
            the output reads back as something else.
    """
    arguments = locals()
    options, execution = pick(MergeOptions, arguments), pick(ExecutionOptions, arguments)
    from lorafast._merge.subtract import subtract_adapters

    return subtract_adapters(
        merged, adapters, output, original=original, options=options, execution=execution
    )
