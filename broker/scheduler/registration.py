"""What a registration asks for, and what becomes of it with what the instance itself says when it is probed."""

from __future__ import annotations

import msgspec

from broker.types import EngineKind, Instance, PairFields


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for, before the instance was probed."""

    instance: Instance
    """With `engine` OPENAI as long as the kind is not known."""
    engine: EngineKind | None = None
    """As registered; None = to be found by probing."""
    index: int = -1
    """Its place in register.yaml; -1 = it came by itself."""
    serves_any_model: bool = False
    """Its models do not matter."""

    @property
    def names_models(self) -> bool:
        """The server is not asked for its models: it lists them, or they do not matter."""
        return self.serves_any_model or bool(self.instance.models)

    @property
    def left_open(self) -> tuple[str, ...]:
        """What probing has to find."""
        said = {
            "engine": self.engine is not None,
            "models": self.names_models,
            "load_endpoint": bool(self.instance.load_endpoint),
        }
        return tuple(field for field, is_said in said.items() if not is_said)

    def taken_as(self, kind: EngineKind | None) -> Registration:
        """With a kind for an engine that does not say its own, which is asked nothing more then."""
        if kind is None or self.engine is not None:
            return self
        return msgspec.structs.replace(self, engine=kind, serves_any_model=True)

    @property
    def has_fastdeploy_fields(self) -> bool:
        """It carries fields that only FastDeploy's engines send: decides when probing finds no mark."""
        return self.instance.fastdeploy is not None

    def joined(
        self,
        engine: EngineKind,
        models: tuple[str, ...] = (),
        load_endpoint: str = "",
        engine_ids: tuple[str, ...] = (),
    ) -> Instance:
        """The instance with what probing found; what was registered has precedence."""
        ours = self.instance
        pair = ours.pair
        if engine_ids:
            pair = msgspec.structs.replace(pair or PairFields(), engine_ids=engine_ids)
        load_endpoint = ours.load_endpoint or load_endpoint
        polled = engine not in (EngineKind.OPENAI, EngineKind.NATIVE) and not load_endpoint
        return msgspec.structs.replace(
            ours,
            engine=engine,
            models=ours.models or models,
            load_endpoint=load_endpoint,
            metrics_url=ours.metrics_url if polled else "",
            pair=pair,
            left_open=self.left_open,
        )

    def rejoined(self, known: Instance) -> Instance | None:
        """The instance when one that is known and well registers again: what probing found then still holds.

        The last registration stands as a whole: what only an earlier one said does not hold any more, and None is
        returned, because it must be probed. A native engine's own hello has precedence over what others say of it.
        """
        if known.is_native:
            return known
        if not set(self.left_open) <= set(known.left_open):
            return None
        engine_ids = known.pair.engine_ids if known.pair else ()
        return self.joined(self.engine or known.engine, known.models, known.load_endpoint, engine_ids)
