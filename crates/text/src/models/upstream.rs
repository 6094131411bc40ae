//! The stock models of the crate `candle-transformers`, on the same weights and inputs as ours: what anyone on candle
//! gets today.

use std::collections::BTreeMap;

use candle_core::Tensor;
use candle_nn::VarBuilder;
use candle_transformers::models::{bert, t5};
use roofbench_core::cost::{self, PhaseCost};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Session, SessionError, Tensors};
use roofbench_nn::activation::Activation;

use super::bert::{BertConfig, HeadKind, TokenIds, forward_cost};
use super::t5::{T5Config, TOKENS, decoder_cost, encoder_cost};
use crate::seq2seq::{Request, generate_cost, with_tokens};

/// `BertModel` (without pooler) and `BertForMaskedLM`.
pub(crate) struct Bert {
    cfg: BertConfig,
    model: Model,
    /// What the cost counts: the pooler is not there.
    head: Option<HeadKind>,
    bytes_per_element: u64,
}

enum Model {
    Encoder(Box<bert::BertModel>),
    MaskedLm(Box<bert::BertForMaskedLM>),
}

impl Bert {
    pub(crate) fn load(spec: &ModelSpec, vb: VarBuilder<'static>) -> Result<Self, SessionError> {
        let cfg = BertConfig::from_spec(spec)?;
        let unsupported = |reason: String| SessionError::UnsupportedEngine { family: spec.family.clone(), reason };
        let hidden_act = match cfg.hidden_act {
            Activation::Gelu => bert::HiddenAct::Gelu,
            Activation::GeluTanh => bert::HiddenAct::GeluApproximate,
            Activation::Relu => bert::HiddenAct::Relu,
            other => {
                return Err(unsupported(format!("candle-transformers has no activation {other:?}; use roofbench")));
            }
        };
        let config = bert::Config {
            vocab_size: cfg.vocab_size,
            hidden_size: cfg.hidden_size,
            num_hidden_layers: cfg.num_hidden_layers,
            num_attention_heads: cfg.num_attention_heads,
            intermediate_size: cfg.intermediate_size,
            hidden_act,
            max_position_embeddings: cfg.max_position_embeddings,
            type_vocab_size: cfg.type_vocab_size,
            layer_norm_eps: cfg.layer_norm_eps,
            ..bert::Config::default()
        };
        let head = HeadKind::of(spec)?;
        let tied = cfg.tie_word_embeddings;
        let vb = vb.rename_f(move |name| stored_name(head, tied, name).to_string());
        let model = match head {
            HeadKind::Pooler => Model::Encoder(Box::new(bert::BertModel::load(vb, &config)?)),
            HeadKind::MaskedLm => Model::MaskedLm(Box::new(bert::BertForMaskedLM::load(vb, &config)?)),
            HeadKind::Classifier { .. } => {
                return Err(unsupported(format!("candle-transformers has no {}; use roofbench", spec.class)));
            }
        };
        let head = Some(head).filter(|_| matches!(model, Model::MaskedLm(_)));
        Ok(Self { cfg, model, head, bytes_per_element: spec.dtype.size_in_bytes() as u64 })
    }
}

/// Where the tensor is that the stock model asks for as `name`.
fn stored_name(head: HeadKind, tied: bool, name: &str) -> &str {
    match (head, name) {
        // the stock model has no notion of tying
        (HeadKind::MaskedLm, "cls.predictions.decoder.weight") if tied => "bert.embeddings.word_embeddings.weight",
        (HeadKind::MaskedLm, "cls.predictions.decoder.bias") if tied => "cls.predictions.bias",
        // it prefixes `bert` once more when it sees a tensor of that name, and synthetic weights have every tensor
        (HeadKind::MaskedLm, _) => name.strip_prefix("bert.").filter(|rest| rest.starts_with("bert.")).unwrap_or(name),
        _ => name.strip_prefix("bert.").unwrap_or(name),
    }
}

impl Session for Bert {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        if call.inputs.contains_key("position_ids") {
            return Err(SessionError::input(
                "position_ids",
                "candle-transformers counts positions by itself; leave it out",
            ));
        }
        let ids = TokenIds::read(&self.cfg, call)?;
        let types: Tensor = ids.token_type_ids.broadcast_as(ids.input_ids.shape())?.contiguous()?;
        let (input_ids, mask) = (&ids.input_ids, ids.attention_mask.as_ref());
        let (name, output) = match &self.model {
            Model::Encoder(model) => ("last_hidden_state", model.forward(input_ids, &types, mask)?),
            Model::MaskedLm(model) => ("logits", model.forward(input_ids, &types, mask)?),
        };
        observer.end(Phase::Forward);
        Ok(Tensors::from([(name.into(), output)]))
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let (batch, seq) = TokenIds::read(&self.cfg, call)?.input_ids.dims2()?;
        let cost = forward_cost(&self.cfg, self.head, [batch, seq], self.bytes_per_element);
        Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }])
    }

    fn paths(&self) -> BTreeMap<String, String> {
        [("all".to_string(), "candle".to_string())].into()
    }
}

/// `T5ForConditionalGeneration`, which only generates, from inputs without padding.
///
/// Its decoder sorts positions into the buckets of an encoder, so from some eight tokens on its logits are not the
/// class's. It has no cache for the keys and values of the encoder's states and makes them anew for every token; the
/// cost counts them once, as for ours.
pub(crate) struct T5 {
    cfg: T5Config,
    spec: ModelSpec,
    model: t5::T5ForConditionalGeneration,
}

impl T5 {
    pub(crate) fn load(spec: &ModelSpec, vb: VarBuilder<'static>) -> Result<Self, SessionError> {
        let cfg = T5Config::from_spec(spec)?;
        let unsupported = |reason: String| SessionError::UnsupportedEngine { family: spec.family.clone(), reason };
        let tied = cfg.tie_word_embeddings != Some(false);
        let activation = match cfg.act()? {
            Activation::Gelu => candle_nn::Activation::Gelu,
            Activation::GeluTanh => candle_nn::Activation::NewGelu,
            Activation::Relu => candle_nn::Activation::Relu,
            Activation::Silu => candle_nn::Activation::Silu,
            other => {
                return Err(unsupported(format!("candle-transformers has no activation {other:?}; use roofbench")));
            }
        };
        if spec.class != "T5ForConditionalGeneration" || tied != cfg.scales_outputs() {
            let what = format!("{} with tie_word_embeddings = {tied}", spec.class);
            return Err(unsupported(format!("candle-transformers is not wrapped for {what}; use roofbench")));
        }
        let config = t5::Config {
            vocab_size: cfg.vocab_size,
            d_model: cfg.d_model,
            d_kv: cfg.d_kv,
            d_ff: cfg.d_ff,
            num_layers: cfg.num_layers,
            num_decoder_layers: cfg.num_decoder_layers,
            num_heads: cfg.num_heads,
            relative_attention_num_buckets: cfg.relative_attention_num_buckets,
            relative_attention_max_distance: cfg.relative_attention_max_distance,
            layer_norm_epsilon: cfg.layer_norm_epsilon,
            feed_forward_proj: t5::ActivationWithOptionalGating { gated: cfg.is_gated(), activation },
            tie_word_embeddings: tied,
            ..t5::Config::default()
        };
        let model = t5::T5ForConditionalGeneration::load(vb, &config)?;
        Ok(Self { cfg, spec: with_tokens(spec, TOKENS), model })
    }

    fn read(&self, call: &Call) -> Result<Request, SessionError> {
        if call.method != "generate" {
            return Err(SessionError::input("method", "candle-transformers' T5 only generates; call generate"));
        }
        let request = Request::read(call, self.cfg.vocab_size)?;
        match &request.attention_mask {
            Some(mask) if mask.min_all()?.to_scalar::<i64>()? == 0 => {
                Err(SessionError::input("attention_mask", "candle-transformers' T5 takes no padding; leave it out"))
            }
            _ => Ok(request),
        }
    }
}

impl Session for T5 {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let request = self.read(call)?;
        let (generation, prompt) = request.plan(&self.spec, call)?;
        self.model.clear_kv_cache();
        let states = self.model.encode(&request.input_ids)?;
        // it multiplies by √d_model where the class divides
        let scale = if self.cfg.scales_outputs() { 1.0 / self.cfg.d_model as f64 } else { 1.0 };
        generation.run(&prompt, observer, |tokens| {
            let ids = tokens.map_or_else(|| prompt.concat(), <[i64]>::to_vec);
            let ids = Tensor::from_vec(ids, (prompt.len(), ()), &self.spec.device)?;
            Ok((self.model.decode(&ids, &states)? * scale)?)
        })
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let request = self.read(call)?;
        let (generation, prompt) = request.plan(&self.spec, call)?;
        let (batch, states) = request.input_ids.dims2()?;
        let [batch, states, length] = [batch, states, prompt.first().map_or(0, Vec::len)].map(|size| size as u64);
        let bytes = self.spec.dtype.size_in_bytes() as u64;
        let encoder = cost::embedding(batch * states, self.cfg.d_model as u64, bytes)
            + encoder_cost(&self.cfg, [batch, states], bytes);
        let pass = |pass| decoder_cost(&self.cfg, pass, states, bytes);
        Ok(generate_cost(pass, encoder, [batch, length], generation.max_new_tokens as u64))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        [("all".to_string(), "candle".to_string())].into()
    }
}
