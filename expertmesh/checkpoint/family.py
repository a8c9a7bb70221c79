"""How one family of models is laid out on disk and described by its config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from expertmesh.checkpoint.config import Config
from expertmesh.model import GateSpec, LayerSpec, Slot


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How one model_type is laid out on disk.

    Templates take {layer}, {expert} and {part}, `parts` being gate, up and down in that order.
    """

    model_type: str
    defaults: Mapping[str, object]  # of keys that config.json may leave out or set to null
    num_experts_key: str
    width_key: str = "moe_intermediate_size"  # of a routed expert
    expects: Mapping[str, object] = field(default_factory=dict)  # the only value served
    is_sparse: Callable[[Config, int], bool]  # does this layer route?
    shared_width: Callable[[Config], int]
    gate_spec: Callable[[Config], GateSpec]

    block: str = "model.layers.{layer}.mlp."
    expert: str = "experts.{expert}.{part}.weight"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "shared_experts.{part}.weight"
    dense: str = "{part}.weight"
    gate: str = "gate.weight"
    bias: str = ""  # "" where the family has none
    shared_gate: str = ""

    def layer_spec(self, config: Config, index: int) -> LayerSpec:
        """What config.json says about one layer."""
        activation = str(config.get("hidden_act"))
        if not self.is_sparse(config, index):
            return LayerSpec(
                index=index,
                num_experts=0,
                intermediate_size=0,
                shared_intermediate_size=config.size("intermediate_size"),
                activation=activation,
            )
        shared_width = self.shared_width(config)
        return LayerSpec(
            index=index,
            num_experts=config.size(self.num_experts_key),
            intermediate_size=config.size(self.width_key),
            shared_intermediate_size=shared_width,
            shared_gated=bool(self.shared_gate) and shared_width > 0,
            gate=self.gate_spec(config),
            activation=activation,
        )

    def weight_names(self, layer: LayerSpec, slot: Slot) -> tuple[str, str, str]:
        """Names of a slot's gate, up and down matrices."""
        template = self.expert
        if slot.expert == layer.shared_id:
            template = self.shared if layer.kind == "moe" else self.dense
        gate, up, down = (
            self._name(template, slot.layer, expert=slot.expert, part=part) for part in self.parts
        )
        return gate, up, down

    def gate_name(self, layer: int) -> str:
        """Name of a layer's gate matrix."""
        return self._name(self.gate, layer)

    def bias_name(self, layer: int) -> str | None:
        """Name of a layer's trained expert bias, where the family has one."""
        return self._name(self.bias, layer) if self.bias else None

    def shared_gate_name(self, layer: LayerSpec) -> str | None:
        """Name of the vector that gates a layer's shared expert, where it is gated."""
        return self._name(self.shared_gate, layer.index) if layer.shared_gated else None

    def _name(self, template: str, layer: int, **fields: object) -> str:
        return (self.block + template).format(layer=layer, **fields)
