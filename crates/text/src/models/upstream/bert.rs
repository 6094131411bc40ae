//! `candle_transformers::models::bert` behind our session.

use std::collections::BTreeMap;

use candle_core::Tensor;
use candle_nn::VarBuilder;
use candle_transformers::models::bert;
use roofbench_core::cost::PhaseCost;
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Session, SessionError, Tensors};
use roofbench_nn::activation::Activation;

use crate::models::bert::{BertConfig, HeadKind, TokenIds, forward_cost};

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
