"""The language model: blocks of mixer and SwiGLU, in Hugging Face's conventions.

Padding ends here: a padded batch becomes one packed row, so layers see tokens only. Axes: B batch,
T time, M tokens of a packed row, D model width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from gdn2.models.cache import Gdn2Cache
from gdn2.models.configuration import Gdn2Config
from gdn2.models.loss import IGNORED, linear_cross_entropy, token_losses
from gdn2.models.mixers import MIXERS
from gdn2.modules import RMSNorm, SwiGLU
from gdn2.modules.linear import OutputLinear

NEEDS_ROLLBACK = (GenerationMode.ASSISTED_GENERATION, GenerationMode.CONTRASTIVE_SEARCH)


class Block(nn.Module):
    """``x += mixer(norm(x)); x += mlp(norm(x))``; without the second if its size is 0."""

    def __init__(self, config: Gdn2Config, mixer: str):
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = MIXERS[mixer].build(config)
        self.mlp: SwiGLU | None = None
        if config.intermediate_size:
            self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, *, state: Any = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        y, state = self.mixer(self.mixer_norm(x), state=state, cu_seqlens=cu_seqlens)
        return self._feed_forward(x + y), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token, ``x [B, D]``."""
        y, state = self.mixer.step(self.mixer_norm(x), state)
        return self._feed_forward(x + y), state

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x if self.mlp is None else x + self.mlp(self.mlp_norm(x))


class Gdn2PreTrainedModel(PreTrainedModel):
    config_class = Gdn2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True
    _keep_in_fp32_modules_strict = {"A_log", "dt_bias", "D", "B_bias", "C_bias"}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw the parameters that `module` itself owns; those that a checkpoint gave stay."""
        own = list(module.parameters(recurse=False))
        tied = self.config.tie_word_embeddings and module is getattr(self, "lm_head", None)
        if tied or not own:
            return
        given = [(p, p.clone()) for p in own if getattr(p, "_is_hf_initialized", False)]
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, OutputLinear):
            module.reset_parameters(scale=(2 * self.config.num_hidden_layers) ** -0.5)
        else:
            module.reset_parameters()  # type: ignore[operator]
        for parameter, value in given:
            parameter.copy_(value)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: saving again must write the same files, not copies of this package."""


class Gdn2Model(Gdn2PreTrainedModel):
    """Tokens to hidden states."""

    def __init__(self, config: Gdn2Config):
        super().__init__(config)
        self.gradient_checkpointing = False
        with no_init_weights():  # post_init draws every parameter, once
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(Block(config, mixer) for mixer in config.layer_mixers)
            self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Gdn2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        position_ids: None = None,
    ) -> BaseModelOutputWithPast:
        """Run the blocks over ``input_ids [B, T]``, or over embeddings ``[B, T, D]``.

        attention_mask: ``[B, >= T]``, its last T columns belong to these tokens; ones must be
        contiguous in a row. Hidden states at padding are zeros. cu_seqlens ``[N + 1]`` says
        that the one row holds N sequences end to end; the cache is then theirs. Positions are
        counted from these two, and position_ids is refused. output_hidden_states: also return
        the embeddings and what each block makes of them, the last of them after the last norm.
        """
        if position_ids is not None:
            raise ValueError(
                "position_ids must be None: positions are counted from attention_mask or cu_seqlens"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = past_key_values
        if use_cache and cache is None:
            cache = Gdn2Cache(len(self.layers))
        B, T = x.shape[:2]
        mask = None if attention_mask is None else _token_mask(attention_mask, B, T)
        if mask is not None and cu_seqlens is not None:
            raise ValueError("attention_mask and cu_seqlens exclude each other")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden: list[Tensor] | None = [] if output_hidden_states else None
        if mask is None:
            x = self._run(x, cache, cu_seqlens, hidden)
        else:
            x = self._run_padded(x, cache, mask, hidden)
        if cache is not None:
            cache.num_columns += T
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=None if hidden is None else (*hidden, x),
        )

    def _run_padded(
        self, x: Tensor, cache: Gdn2Cache | None, mask: Tensor, hidden: list[Tensor] | None
    ) -> Tensor:
        """Run the tokens of a padded batch as one packed row; zeros elsewhere."""
        cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0))
        rows = mask.flatten().nonzero()[:, 0]

        def pad(y: Tensor) -> Tensor:
            return y.new_zeros(x.flatten(0, 1).shape).index_copy(0, rows, y[0]).view_as(x)

        packed = x.flatten(0, 1).index_select(0, rows).unsqueeze(0)
        y = self._run(packed, cache, cu_seqlens, hidden)
        if hidden is not None:
            hidden[:] = map(pad, hidden)
        return pad(y)

    def _run(
        self,
        x: Tensor,
        cache: Gdn2Cache | None,
        cu_seqlens: Tensor | None,
        hidden: list[Tensor] | None,
    ) -> Tensor:
        """All blocks and the last norm over ``[B, T, D]`` without padding.

        What each block is given is appended to `hidden`.
        """
        checkpointing = self.gradient_checkpointing and self.training
        if checkpointing and cache is not None:
            raise ValueError("gradient checkpointing computes twice and can not keep a cache")
        states = [None] * len(self.layers) if cache is None else cache.states
        decoding = x.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled()
        block: Any
        for i, block in enumerate(self.layers):
            if hidden is not None:
                hidden.append(x)
            if checkpointing:
                x = self._gradient_checkpointing_func(_hidden_only, block, x, cu_seqlens)
            elif decoding and states[i] is not None:
                y, states[i] = block.step(x[:, 0], states[i])
                x = y.unsqueeze(1)
            else:
                x, state = block(x, state=states[i], cu_seqlens=cu_seqlens)
                if cache is not None:
                    states[i] = state
        return self.norm(x)


class Gdn2ForCausalLM(Gdn2PreTrainedModel, GenerationMixin):
    """Tokens to logits, to a loss, and (`generate`) to more tokens."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _supported_generation_modes = (
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
    )

    def __init__(self, config: Gdn2Config):
        super().__init__(config)
        self.model = Gdn2Model(config)
        with no_init_weights():
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Gdn2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        position_ids: None = None,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, T, vocab_size]``; see `Gdn2Model.forward` for the rest.

        labels: ``[B, T]``, not shifted (Hugging Face's convention), -100 is ignored; the loss is
        then their mean. `loss` is the way to train: it never holds all logits.
        logits_to_keep: only the last so many positions (0: all), or these positions.
        """
        if labels is not None and (cu_seqlens is not None or isinstance(logits_to_keep, Tensor)):
            raise ValueError("labels go with neither cu_seqlens nor a choice of logits: use loss()")
        out = self.model(
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache,
            cu_seqlens,
            output_hidden_states,
            position_ids,
        )
        hidden = out.last_hidden_state
        loss = None
        if labels is not None:
            shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
            total = linear_cross_entropy(
                hidden.flatten(0, 1), self.lm_head.weight, shifted.flatten()
            )
            loss = total / (shifted != IGNORED).sum()
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            loss=loss,
            logits=self.lm_head(hidden[:, keep]),
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
        )

    def loss(
        self, tokens: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cross entropy summed over the valid labels (float32), and how many they are.

        tokens, labels: ``[B, T]``; labels are already shifted, -100 is ignored. cu_seqlens
        ``[N + 1]`` packs N sequences into one row (B = 1). Logits are never all in memory.
        """
        hidden = self._hidden(tokens, labels, cu_seqlens)
        total = linear_cross_entropy(hidden, self.lm_head.weight, labels.flatten())
        return total, (labels != IGNORED).sum()

    @torch.no_grad()
    def token_losses(
        self, tokens: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """The terms of `loss`, ``[B, T]`` float32, zero where the label is -100; no gradient."""
        hidden = self._hidden(tokens, labels, cu_seqlens)
        return token_losses(hidden, self.lm_head.weight, labels.flatten()).view(labels.shape)

    def _hidden(self, tokens: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Hidden states ``[B * T, D]``."""
        if tokens.shape != labels.shape:
            raise ValueError(
                f"tokens and labels must have one shape [B, T], got {list(tokens.shape)} "
                f"and {list(labels.shape)}"
            )
        out = self.model(tokens, use_cache=False, cu_seqlens=cu_seqlens)
        return out.last_hidden_state.flatten(0, 1)

    def statistics(self) -> dict[str, float]:
        """Mean gates of the last forward in training, over layers and a sample of its tokens."""
        means: dict[str, list[Tensor]] = {}
        for module in self.modules():
            for name, mean in getattr(module, "gate_means", {}).items():
                means.setdefault(name, []).append(mean)
        return {name: torch.stack(values).mean().item() for name, values in means.items()}

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Any, *, inputs_embeds: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        kwargs.pop("tokenizer", None)  # of stop strings; `generate` leaves it among these
        prepare = super().prepare_inputs_for_generation  # type: ignore[misc]
        return prepare(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def _get_deprecated_gen_repo(self, generation_mode: GenerationMode, *_: Any) -> None:
        """Refuse what can not work; `generate` would first have the user fetch its code."""
        if generation_mode not in self._supported_generation_modes:
            reason = ""
            if generation_mode in NEEDS_ROLLBACK:
                reason = ", because a recurrent state can not be rolled back"
            modes = (mode.replace("_", " ") for mode in self._supported_generation_modes)
            raise NotImplementedError(
                f"this model can not do {generation_mode.replace('_', ' ')}{reason}; "
                f"generate supports {', '.join(modes)}"
            )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Begin with a cache of ours, so that `prefill_chunk_size` works."""
        prepare = super()._prepare_cache_for_generation  # type: ignore[misc]
        prepare(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = Gdn2Cache(self.config.num_hidden_layers)

    def _prepare_position_ids_for_generation(self, *_: Any) -> None:
        """Make none, although `forward` has an argument of that name."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model brings its own


def _hidden_only(block: Block, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A block without its state: what a checkpoint computes again."""
    return block(x, cu_seqlens=cu_seqlens)[0]


def _token_mask(attention_mask: Tensor, B: int, T: int) -> Tensor | None:
    """The last T columns as booleans ``[B, T]``, or None where nothing is padding."""
    if attention_mask.ndim != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < T:
        raise ValueError(
            f"attention_mask must be [B, >= T] = [{B}, >= {T}], got {list(attention_mask.shape)}"
        )
    mask = attention_mask[:, attention_mask.shape[1] - T :].bool()
    if mask.all():
        return None
    begins = mask & ~F.pad(mask, (1, 0))[:, :-1]
    if (begins.sum(1) > 1).any():
        raise ValueError(
            "attention_mask must be contiguous in each row: padding left or right, not inside"
        )
    return mask


AutoModel.register(Gdn2Config, Gdn2Model, exist_ok=True)
AutoModelForCausalLM.register(Gdn2Config, Gdn2ForCausalLM, exist_ok=True)
