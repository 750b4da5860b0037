"""The Lightning strategy for models with sharded embedding tables."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import ClusterEnvironment, TorchCheckpointIO
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.fbgemm_qcomm_codec import QCommsConfig
from torchrec.distributed.types import QuantizedCommCodecs, ShardingPlan, ShardingPlanner
from torchrec.optim.keyed import KeyedOptimizer

from lightning_embcomp.checkpoints import saving_group
from lightning_embcomp.deferred import deferred_tables
from lightning_embcomp.methods.dct.codecs import CodecRegistry, PooledThresholding
from lightning_embcomp.sizes import parse_bytes
from lightning_embcomp.strategies.checkpointing import DistributedCheckpoints
from lightning_embcomp.strategies.dense import WrapsDense
from lightning_embcomp.strategies.discovery import find_shardable
from lightning_embcomp.strategies.environment import set_local_world_size
from lightning_embcomp.strategies.errors import ShardingError
from lightning_embcomp.strategies.evaluation import EmptyLookups, EvaluatesTogether
from lightning_embcomp.strategies.feeding import FeedsBatches
from lightning_embcomp.strategies.launching import TableLauncher
from lightning_embcomp.strategies.lost import explain
from lightning_embcomp.strategies.optimizers import is_fused
from lightning_embcomp.strategies.options import (
    check_earlier_codecs,
    check_fused_params,
    check_sharding,
    read_codecs,
)
from lightning_embcomp.strategies.pipeline import InputPipeline
from lightning_embcomp.strategies.planning import (
    PlannerFactory,
    PlanSettings,
    check_earlier_plans,
    fused_tables,
    make_plan,
)
from lightning_embcomp.strategies.refusals import check_averaging, check_fused, check_pipeline, check_precision
from lightning_embcomp.strategies.sharders import SharderFor, default_sharders
from lightning_embcomp.strategies.sharding import shard_in_place
from lightning_embcomp.strategies.stepping import StepsOnce
from lightning_embcomp.strategies.wrapping import ignore_in_ddp, sync_dense_states

_log = logging.getLogger(__name__)


class TorchRecStrategy(StepsOnce, FeedsBatches, EvaluatesTogether, WrapsDense, DistributedCheckpoints):
    """Shards the TorchRec embedding collections of any LightningModule over processes; the rest trains in DDP.

    The module needs no change: every ``EmbeddingBagCollection``, ``EmbeddingCollection`` and their fused versions are
    replaced in place by sharded ones, with their weights. Tables that are built in ``configure_model`` are never
    allocated in full. Losses are means over the processes' batches, so ``n`` processes train as one with an ``n`` times
    larger batch.

    Tables with an optimizer in the backward pass (``apply_optimizer_in_backward``, fused collections, or
    ``fused_params``) keep it; gradient clipping, accumulation and ``16-mixed`` do not reach those and are refused.
    Tables without one get gradients for the optimizer of ``configure_optimizers``, which may take
    ``self.parameters()``.

    Args:
        sharding: Allowed sharding types (``table_wise``, ``row_wise``, ``column_wise``, ``data_parallel``, ...) by a
            glob of table names; the first glob that matches a table counts. By default the planner chooses.
        fused_params: Optimizer for tables that have none of their own: ``optimizer`` (``sgd``, ``adagrad``,
            ``rowwise_adagrad`` or ``adam``), ``learning_rate``, and other arguments of FBGEMM's tables.
        planner: A TorchRec planner, or a class or function that builds one when called with ``topology``,
            ``constraints``, ``batch_size`` and ``storage_reservation``.
        hbm: Device memory for each process, such as ``80GB``; by default what the device has.
        ddr: Host memory for each process; by default the machine's over its processes.
        batch_size: Rows of a batch for each process, for the planner's estimates.
        codecs: How rows and gradients are encoded while they travel: ``PooledThresholding`` (largest entries of each
            sample, or fewer bits), TorchRec's ``QCommsConfig``, or codecs by
            operation.
        pipeline: ``sparse_dist`` sends the ids of the next batch to their tables while the present one trains, on CUDA
            with NCCL only; ``none`` does not.
        defer_tables: Whether tables built in ``configure_model`` are allocated and initialised only in shards.
        weights_only: Whether checkpoints with objects of unknown classes, say of a callback, are refused.
        ddp_comm_state: State of ``ddp_comm_hook``.
        ddp_comm_hook: Communication hook for the gradients of the dense rest; works on the CPU too.
        ddp_comm_wrapper: Wraps the hook.
        process_group_backend: ``gloo`` or ``nccl``; by default that of the device.
        timeout: How long a process waits for the others before it gives up.
        start_method: How processes are started if no launcher has done so: ``popen``, ``spawn``, ...
        ddp: Arguments for ``DistributedDataParallel`` around the dense rest, such as ``find_unused_parameters``.
        accelerator: Lightning's accelerator; the trainer's by default, as for the following.
        parallel_devices: Devices of the processes on this machine.
        cluster_environment: Who started the processes.
        precision_plugin: Lightning's precision plugin.

    Raises:
        ValueError: If an option cannot be read.

    Example:
        >>> strategy = TorchRecStrategy(sharding={"user": "row_wise"}, ddr="4GB")
        >>> trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False)
        >>> trainer.strategy.sharded_paths
        []
    """

    strategy_name = "torchrec"

    def __init__(
        self,
        sharding: Mapping[str, str | list[str]] | None = None,
        fused_params: Mapping[str, Any] | None = None,
        planner: ShardingPlanner | PlannerFactory | None = None,
        hbm: str | int | None = None,
        ddr: str | int | None = None,
        batch_size: int | None = None,
        codecs: PooledThresholding | QCommsConfig | Mapping[str, QuantizedCommCodecs] | None = None,
        pipeline: Literal["none", "sparse_dist"] = "none",
        defer_tables: bool = True,
        weights_only: bool = True,
        ddp_comm_state: object | None = None,
        ddp_comm_hook: Callable[..., Any] | None = None,
        ddp_comm_wrapper: Callable[..., Any] | None = None,
        process_group_backend: Literal["gloo", "nccl"] | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        ddp: Mapping[str, Any] | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if pipeline not in ("none", "sparse_dist"):
            raise ValueError(f"pipeline must be 'none' or 'sparse_dist', got {pipeline!r}")
        super().__init__(
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            ddp_comm_state=ddp_comm_state,
            ddp_comm_hook=ddp_comm_hook,
            ddp_comm_wrapper=ddp_comm_wrapper,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            precision_plugin=precision_plugin,
            **{"static_graph": False, "gradient_as_bucket_view": True, **(ddp or {})},
        )
        self._settings = PlanSettings(
            sharding=check_sharding(sharding),
            fused_params=check_fused_params(fused_params),
            hbm=None if hbm is None else parse_bytes(hbm),
            ddr=None if ddr is None else parse_bytes(ddr),
            batch_size=batch_size,
        )
        self._planner = planner
        self._codecs = codecs
        self._registry: dict[str, QuantizedCommCodecs] | None = None
        self._overlap = pipeline == "sparse_dist"
        self._defer_tables = defer_tables
        self.weights_only = weights_only
        self._parameter_order = []
        self.plan: ShardingPlan | None = None
        self._fused_tables: list[str] = []

    # Processes -----------------------------------------------------------------------------------------------------

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if self._start_method != "popen":
            self._launcher = TableLauncher(self, start_method=self._start_method)

    def setup_distributed(self) -> None:
        """Start the process group."""
        set_local_world_size(self.cluster_environment, self.num_processes)
        super().setup_distributed()

    # Sharding ------------------------------------------------------------------------------------------------------

    @property
    def planner(self) -> ShardingPlanner | PlannerFactory | None:
        """The user's planner."""
        return self._planner

    @property
    def codec_registry(self) -> dict[str, QuantizedCommCodecs] | None:
        """Codecs of what processes exchange, by TorchRec's name of the operation; None for plain exchange."""
        if self._registry is None:
            self._registry = read_codecs(self._codecs, self.root_device)
        return self._registry

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Leave the tables that ``configure_model`` builds on the meta device, until they are sharded."""
        if not self._defer_tables:
            yield
            return
        with deferred_tables():
            yield

    def shard(
        self,
        pl_module: pl.LightningModule,
        sharder_for: SharderFor | None = None,
        planner: ShardingPlanner | PlannerFactory | None = None,
    ) -> None:
        """Shard the collections of a module in place; what is sharded already stays as it is.

        The strategy does so in its own ``setup``. A callback may do it before, in its ``setup`` hook, when the process
        group is up; all processes call it.

        Args:
            pl_module: The module.
            sharder_for: Chooses a sharder by path and module, from the outside in; None for the default one. A
                sharder with a true attribute ``carries_weights`` puts the first values into its tables itself.
            planner: A planner for these collections, in place of the strategy's.

        Raises:
            ShardingError: If a collection cannot be sharded, or no plan fits.
        """
        found = find_shardable(pl_module, sharder_for)
        if not found:
            return
        defaults = default_sharders(self._settings.fused_params, self.codec_registry)
        fused = fused_tables(found, defaults, self._settings.fused_params)
        plan = make_plan(pl_module, found, defaults, self.root_device, self._settings, planner or self._planner)
        if isinstance(self.codec_registry, CodecRegistry):
            self.codec_registry.check_plan(plan, pl_module)
        shard_in_place(pl_module, found, plan, defaults, self.root_device)
        self.plan = ShardingPlan({**(self.plan.plan if self.plan else {}), **plan.plan})
        self._fused_tables += fused

    # Setup ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer) -> None:
        """Shard, wrap the rest in DDP, and set up optimizers.

        Args:
            trainer: The trainer.

        Raises:
            ShardingError: If there is nothing to shard, or a setting does not reach the tables.
        """
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        if type(self.checkpoint_io) is not TorchCheckpointIO:
            raise ShardingError(
                f"{type(self.checkpoint_io).__name__} has no effect: checkpoints of sharded tables are written by all"
                " processes together. Leave the plugin out"
            )
        # A process that dies later breaks this connection, instead of leaving the others waiting.
        saving_group(self._timeout)
        check_precision(trainer)
        check_averaging(trainer)
        module = self.lightning_module
        self.shard(module)
        if not self.sharded_modules:
            raise ShardingError(
                f"{type(module).__name__} has no EmbeddingBagCollection or EmbeddingCollection to shard: use"
                " strategy='ddp'"
            )
        self._adopt(module)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            check_fused(trainer, self._fused_tables)
        if fitting and self._layer_sync:
            self.model = self._layer_sync.apply(module)
        self.model_to_device()
        ignore_in_ddp(module, self.sharded_paths)
        self._lookups = EmptyLookups(self.sharded_modules.values())
        if fitting:
            if self._overlap:
                check_pipeline(trainer)
                self._pipeline = InputPipeline(self.sharded_modules)
            self.configure_ddp()
            self.setup_optimizers(trainer)
        else:
            sync_dense_states(module)
        self.setup_precision_plugin()
        if fitting:
            # State of fused optimizers is where the tables are, and TorchRec's mappings cannot be written.
            _optimizers_to_device([o for o in self.optimizers if not isinstance(o, KeyedOptimizer)], self.root_device)

    def _adopt(self, module: pl.LightningModule) -> None:
        """Take over collections that an earlier run has sharded."""
        known = self.plan.plan if self.plan else {}
        earlier = {path: sharded for path, sharded in self.sharded_modules.items() if path not in known}
        plans: dict[str, Any] = {path: getattr(m, "module_sharding_plan", {}) for path, m in earlier.items()}
        check_earlier_plans(plans, self._settings, others=known)
        check_earlier_codecs(self.codec_registry, earlier)
        self.plan = ShardingPlan({**known, **plans})
        self._fused_tables += [
            name.removesuffix(".weight")
            for path in earlier
            for name, parameter in module.get_submodule(path).named_parameters(prefix=path)
            if is_fused(parameter)
        ]

    # End -----------------------------------------------------------------------------------------------------------

    def on_exception(self, exception: BaseException) -> None:
        """Say what happened, where the error itself does not.

        Args:
            exception: What ended the run on this process.
        """
        message = explain(exception, self.global_rank)
        if message is not None:
            _log.error(message)
        super().on_exception(exception)

    def teardown(self) -> None:
        """Unwrap the module, which stays sharded and where it is: tables cannot be moved."""
        if isinstance(self.model, DistributedDataParallel):
            self.model = self.lightning_module
        if self._layer_sync and self.model is not None:
            self.model = self._layer_sync.revert(self.model)
        self.precision_plugin.__dict__.pop("clip_grad_by_norm", None)
        self._rates = None
        if self._pipeline is not None:
            self._pipeline.stop()
            self._pipeline = None
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
