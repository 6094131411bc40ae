//! `candle_transformers::models::t5` behind our session.

use std::collections::BTreeMap;

use candle_core::Tensor;
use candle_nn::VarBuilder;
use candle_transformers::models::t5;
use roofbench_core::cost::{self, PhaseCost};
use roofbench_core::session::{Call, ModelSpec, Observer, Session, SessionError, Tensors};
use roofbench_nn::activation::Activation;

use crate::models::t5::{T5Config, TOKENS, decoder_cost, encoder_cost};
use crate::seq2seq::{Request, generate_cost, with_tokens};

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
