//! BART encoder and decoder: learned positions, normalised embeddings, normalisation after each half of a layer. The
//! decoder (and the encoder) of MBart is the same with normalisation before each half.
//! Source: BART (arXiv:1910.13461). Mirrors `transformers.BartForConditionalGeneration`, and `MBartDecoder` as a part.

use candle_core::Tensor;
use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, Norm};
use roofbench_core::session::{ModelSpec, Result, SessionError};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Mask, Pattern, SelfAttention};
use roofbench_nn::cross_attention::Encoded;
use roofbench_nn::decoding::Decoding;
use roofbench_nn::embedding::Embedding;
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use roofbench_nn::norm::LayerNorm;
use serde::Deserialize;
use serde_json::json;

use crate::causal::{DecoderShape, Pass};
use crate::seq2seq::{CrossDecoder, Seq2SeqLm};

/// The classes that run.
pub const CLASSES: &[&str] = &["BartForConditionalGeneration"];

/// Names in published checkpoints. The first is for those saved from `BartModel`, whose logits have no bias.
const RULES: &[AliasRule] = &[
    AliasRule::drop(r"^final_logits_bias$", AliasScope::Always),
    // one matrix with four names
    AliasRule::rename(
        r"^(model\.)?(encoder|decoder)\.embed_tokens\.weight$",
        "model.shared.weight",
        AliasScope::Always,
    ),
    AliasRule::rename(r"^lm_head\.weight$", "model.shared.weight", AliasScope::Always),
    // saved from BartModel
    AliasRule::rename(r"^(encoder|decoder|shared)\.", "model.$1.", AliasScope::Always),
];

/// How published checkpoints name the tensors of `spec`.
pub fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    if spec.config.get("architectures") == Some(&json!(["BartModel"])) { RULES } else { &RULES[1..] }
}

/// Of every normalisation.
const EPS: f64 = 1e-5;

/// Rows of the table of positions before the first position.
const OFFSET: usize = 2;

/// The part of `config.json` that shapes the computation; field names are the file's own, and what it leaves out is as
/// `transformers.BartConfig` has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct BartConfig {
    /// Distinct tokens.
    pub vocab_size: usize,
    /// Width of the stream.
    pub d_model: usize,
    /// Longest sequence of either half.
    pub max_position_embeddings: usize,
    /// Layers of the encoder.
    pub encoder_layers: usize,
    /// Its heads; they divide `d_model`.
    pub encoder_attention_heads: usize,
    /// Width inside its feed-forward half.
    pub encoder_ffn_dim: usize,
    /// Layers of the decoder.
    pub decoder_layers: usize,
    /// Its heads; they divide `d_model`.
    pub decoder_attention_heads: usize,
    /// Width inside its feed-forward half.
    pub decoder_ffn_dim: usize,
    /// Activation of the feed-forward halves.
    pub activation_function: Activation,
    /// The embeddings of tokens are multiplied by √d_model.
    pub scale_embedding: bool,
    /// Normalisation stands before each half of a layer and after the last layer; no field of BART's, MBart has it so.
    #[serde(skip)]
    pub pre_norm: bool,
}

impl Default for BartConfig {
    fn default() -> Self {
        Self {
            vocab_size: 50265,
            d_model: 1024,
            max_position_embeddings: 1024,
            encoder_layers: 12,
            encoder_attention_heads: 16,
            encoder_ffn_dim: 4096,
            decoder_layers: 12,
            decoder_attention_heads: 16,
            decoder_ffn_dim: 4096,
            activation_function: Activation::Gelu,
            scale_embedding: false,
            pre_norm: false,
        }
    }
}

impl BartConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is malformed, contradicts another, or changes the result in a way that isn't supported.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        cfg.check_decoder()?;
        config::sizes(&[
            ("encoder_layers", cfg.encoder_layers),
            ("encoder_attention_heads", cfg.encoder_attention_heads),
            ("encoder_ffn_dim", cfg.encoder_ffn_dim),
        ])?;
        config::multiple(("d_model", cfg.d_model), ("encoder_attention_heads", cfg.encoder_attention_heads))?;
        config::refuse_unless(spec, "tie_word_embeddings", &[true.into()])?;
        Ok(cfg)
    }

    /// Reads and checks the config of a decoder of MBart alone, in which the encoder's fields mean nothing.
    ///
    /// # Errors
    /// Names the field that is malformed or contradicts another.
    pub fn mbart_decoder(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg = Self { pre_norm: true, ..spec.parse_config()? };
        cfg.check_decoder()?;
        Ok(cfg)
    }

    fn check_decoder(&self) -> Result<(), SessionError> {
        config::sizes(&[
            ("vocab_size", self.vocab_size),
            ("d_model", self.d_model),
            ("max_position_embeddings", self.max_position_embeddings),
            ("decoder_layers", self.decoder_layers),
            ("decoder_attention_heads", self.decoder_attention_heads),
            ("decoder_ffn_dim", self.decoder_ffn_dim),
        ])?;
        config::multiple(("d_model", self.d_model), ("decoder_attention_heads", self.decoder_attention_heads))
    }

    fn attention(&self, heads: usize, pattern: Pattern) -> Attention {
        Attention { heads, kv_heads: heads, head_dim: self.d_model / heads, scale: None, pattern }
    }

    fn norm(&self, vb: &VarBuilder, name: &str) -> Result<LayerNorm> {
        LayerNorm::load(self.d_model, EPS, vb.pp(name))
    }

    /// The norm after the last layer, where there is one.
    fn last_norm(&self, vb: &VarBuilder) -> Result<Option<LayerNorm>> {
        self.pre_norm.then(|| self.norm(vb, "layer_norm")).transpose()
    }

    fn half(&self, vb: &VarBuilder, norm: &str) -> Result<Half> {
        Ok(Half { norm: self.norm(vb, norm)?, pre_norm: self.pre_norm })
    }
}

/// The norm around one half of a layer.
struct Half {
    norm: LayerNorm,
    pre_norm: bool,
}

impl Half {
    /// `f` makes the half's result of its input and adds the second argument, the stream.
    fn around(&self, x: &Tensor, f: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>) -> Result<Tensor> {
        if self.pre_norm { f(&self.norm.forward(x)?, x) } else { self.norm.forward(&f(x, x)?) }
    }
}

/// Tokens and positions, normalised.
struct Embeddings {
    embed_tokens: Embedding,
    scale: Option<f64>,
    /// Without the rows before the first position.
    embed_positions: Embedding,
    layernorm_embedding: LayerNorm,
}

impl Embeddings {
    fn load(cfg: &BartConfig, embed_tokens: Embedding, vb: &VarBuilder) -> Result<Self> {
        let rows = cfg.max_position_embeddings;
        let positions = vb.pp("embed_positions").get((rows + OFFSET, cfg.d_model), "weight")?;
        Ok(Self {
            embed_tokens,
            scale: cfg.scale_embedding.then(|| (cfg.d_model as f64).sqrt()),
            embed_positions: Embedding::new(&positions.narrow(0, OFFSET, rows)?)?,
            layernorm_embedding: cfg.norm(vb, "layernorm_embedding")?,
        })
    }

    /// (batch, seq) → (batch, seq, hidden).
    fn tokens(&self, input_ids: &Tensor) -> Result<Tensor> {
        let x = self.embed_tokens.forward(input_ids)?;
        let Some(scale) = self.scale else { return Ok(x) };
        roofbench_nn::cost::elementwise(x.elem_count(), 1);
        x * scale
    }

    /// `x` (batch, seq, hidden) at `position_ids` (1 or batch, seq).
    fn at(&self, x: &Tensor, position_ids: &Tensor) -> Result<Tensor> {
        roofbench_nn::cost::elementwise(x.elem_count(), 1);
        self.layernorm_embedding.forward(&x.broadcast_add(&self.embed_positions.forward(position_ids)?)?)
    }
}

struct EncoderLayer {
    self_attn: SelfAttention,
    out_proj: Linear,
    self_attn_half: Half,
    mlp: Mlp,
    mlp_half: Half,
}

impl EncoderLayer {
    fn load(cfg: &BartConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, attn) = (cfg.d_model, vb.pp("self_attn"));
        let attention = cfg.attention(cfg.encoder_attention_heads, Pattern::Full);
        let sizes = [hidden, cfg.encoder_ffn_dim];
        Ok(Self {
            self_attn: SelfAttention::load(hidden, attention, ["q_proj", "k_proj", "v_proj"], true, attn.clone())?,
            out_proj: Linear::load(hidden, hidden, true, attn.pp("out_proj"))?,
            self_attn_half: cfg.half(&vb, "self_attn_layer_norm")?,
            mlp: Mlp::load(sizes, cfg.activation_function, true, ["fc1", "fc2"], vb.clone())?,
            mlp_half: cfg.half(&vb, "final_layer_norm")?,
        })
    }

    /// `x` and the result are (batch, seq, hidden).
    fn forward(&self, x: &Tensor, mask: Option<&Mask>) -> Result<Tensor> {
        let attend = |x: &Tensor, stream: &Tensor| self.out_proj.forward_add(&self.self_attn.forward(x, mask)?, stream);
        let x = self.self_attn_half.around(x, attend)?;
        self.mlp_half.around(&x, |x, stream| self.mlp.forward_add(x, stream))
    }
}

struct Encoder {
    embeddings: Embeddings,
    layers: Vec<EncoderLayer>,
    layer_norm: Option<LayerNorm>,
}

impl Encoder {
    fn load(cfg: &BartConfig, embed_tokens: Embedding, vb: VarBuilder) -> Result<Self> {
        let layer = |i: usize| EncoderLayer::load(cfg, vb.pp("layers").pp(i));
        Ok(Self {
            embeddings: Embeddings::load(cfg, embed_tokens, &vb)?,
            layers: (0..cfg.encoder_layers).map(layer).collect::<Result<_>>()?,
            layer_norm: cfg.last_norm(&vb)?,
        })
    }

    fn forward(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<Tensor> {
        let positions = Tensor::arange(0u32, input_ids.dim(1)? as u32, input_ids.device())?.unsqueeze(0)?;
        let mask = attention_mask.map(Mask::padding).transpose()?.flatten();
        let mut x = self.embeddings.at(&self.embeddings.tokens(input_ids)?, &positions)?;
        for layer in &self.layers {
            x = layer.forward(&x, mask.as_ref())?; // (batch, seq, hidden)
        }
        match &self.layer_norm {
            Some(norm) => norm.forward(&x),
            None => Ok(x),
        }
    }
}

struct DecoderLayer {
    qkv_proj: Linear,
    self_attn: Attention,
    out_proj: Linear,
    self_attn_half: Half,
    q_proj: Linear,
    kv_proj: Linear,
    encoder_attn: Attention,
    encoder_out_proj: Linear,
    encoder_attn_half: Half,
    mlp: Mlp,
    mlp_half: Half,
}

impl DecoderLayer {
    fn load(cfg: &BartConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, attn, encoder_attn) = (cfg.d_model, vb.pp("self_attn"), vb.pp("encoder_attn"));
        let linear = |name: &str, vb: &VarBuilder| Linear::load(hidden, hidden, true, vb.pp(name));
        let fused = |names: &[&str], vb: &VarBuilder| {
            let parts: Vec<_> = names.iter().map(|name| (*name, hidden)).collect();
            Linear::load_fused(hidden, &parts, true, vb.clone())
        };
        let sizes = [hidden, cfg.decoder_ffn_dim];
        Ok(Self {
            qkv_proj: fused(&["q_proj", "k_proj", "v_proj"], &attn)?,
            self_attn: cfg.attention(cfg.decoder_attention_heads, Pattern::Causal),
            out_proj: linear("out_proj", &attn)?,
            self_attn_half: cfg.half(&vb, "self_attn_layer_norm")?,
            q_proj: linear("q_proj", &encoder_attn)?,
            kv_proj: fused(&["k_proj", "v_proj"], &encoder_attn)?,
            encoder_attn: cfg.attention(cfg.decoder_attention_heads, Pattern::Full),
            encoder_out_proj: linear("out_proj", &encoder_attn)?,
            encoder_attn_half: cfg.half(&vb, "encoder_attn_layer_norm")?,
            mlp: Mlp::load(sizes, cfg.activation_function, true, ["fc1", "fc2"], vb.clone())?,
            mlp_half: cfg.half(&vb, "final_layer_norm")?,
        })
    }

    /// `x` and the result are (batch, seq, hidden).
    fn forward(&self, i: usize, x: &Tensor, decoding: &mut Decoding, encoded: &mut Encoded) -> Result<Tensor> {
        let x = self.self_attn_half.around(x, |x, stream| {
            let [q, k, v] = self.self_attn.split(&self.qkv_proj.forward(x)?)?;
            self.out_proj.forward_add(&decoding.attend(i, &self.self_attn, [&q, &k, &v], None)?, stream)
        })?;
        let x = self.encoder_attn_half.around(&x, |x, stream| {
            let attended = encoded.attend(i, &self.encoder_attn, &self.q_proj.forward(x)?, &self.kv_proj)?;
            self.encoder_out_proj.forward_add(&attended, stream)
        })?;
        self.mlp_half.around(&x, |x, stream| self.mlp.forward_add(x, stream))
    }
}

/// The decoder with its embeddings and output layer.
pub struct BartDecoder {
    cfg: BartConfig,
    embeddings: Embeddings,
    layers: Vec<DecoderLayer>,
    layer_norm: Option<LayerNorm>,
    lm_head: Linear,
    weight_bytes: u64,
}

impl BartDecoder {
    /// Reads what `vb` holds beside the embeddings of tokens.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(cfg: &BartConfig, embed_tokens: Embedding, lm_head: Linear, vb: VarBuilder) -> Result<Self> {
        let layer = |i: usize| DecoderLayer::load(cfg, vb.pp("layers").pp(i));
        Ok(Self {
            cfg: cfg.clone(),
            embeddings: Embeddings::load(cfg, embed_tokens, &vb)?,
            layers: (0..cfg.decoder_layers).map(layer).collect::<Result<_>>()?,
            layer_norm: cfg.last_norm(&vb)?,
            lm_head,
            weight_bytes: vb.dtype().size_in_bytes() as u64,
        })
    }
}

impl CrossDecoder for BartDecoder {
    fn shape(&self) -> DecoderShape {
        DecoderShape {
            vocab_size: self.cfg.vocab_size,
            layers: self.layers.len(),
            kv_width: self.cfg.d_model,
            window: None,
            max_positions: Some(self.cfg.max_position_embeddings),
        }
    }

    fn embed(&self, input_ids: &Tensor) -> Result<Tensor> {
        self.embeddings.tokens(input_ids)
    }

    fn decode(&self, x: Tensor, decoding: &mut Decoding, encoded: &mut Encoded) -> Result<Tensor> {
        let mut x = self.embeddings.at(&x, &decoding.position_ids()?)?;
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(i, &x, decoding, encoded)?; // (batch, seq, hidden)
        }
        match &self.layer_norm {
            Some(norm) => norm.forward(&x),
            None => Ok(x),
        }
    }

    fn logits(&self, x: &Tensor) -> Result<Tensor> {
        self.lm_head.forward(x)
    }

    fn cost(&self, pass: Pass, states: u64) -> Cost {
        decoder_cost(&self.cfg, self.lm_head.has_bias(), pass, states, self.weight_bytes)
    }
}

/// `BartForConditionalGeneration`.
pub struct BartModel {
    encoder: Encoder,
    decoder: BartDecoder,
}

impl BartModel {
    /// Loads the model of `spec`.
    ///
    /// # Errors
    /// As for [`BartConfig::from_spec`], and when a tensor is missing or has another shape.
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let (cfg, model) = (BartConfig::from_spec(spec)?, vb.pp("model"));
        let (embed_tokens, lm_head) = Embedding::load_tied(cfg.vocab_size, cfg.d_model, model.pp("shared"))?;
        let lm_head = match vb.contains_tensor("final_logits_bias") {
            true => lm_head.with_bias(Some(&vb.get((1, cfg.vocab_size), "final_logits_bias")?.squeeze(0)?))?,
            false => lm_head,
        };
        let encoder = Encoder::load(&cfg, embed_tokens.clone(), model.pp("encoder"))?;
        let decoder = BartDecoder::load(&cfg, embed_tokens, lm_head, model.pp("decoder"))?;
        Ok(Self { encoder, decoder })
    }
}

impl Seq2SeqLm for BartModel {
    type Decoder = BartDecoder;

    const TOKENS: &'static [(&'static str, i64)] = &[
        ("pad_token_id", 1),
        ("bos_token_id", 0),
        ("eos_token_id", 2),
        ("decoder_start_token_id", 2),
        ("forced_eos_token_id", 2),
    ];

    const SHIFTS_INPUTS: bool = true;

    fn decoder(&self) -> &BartDecoder {
        &self.decoder
    }

    fn max_positions(&self) -> Option<usize> {
        Some(self.decoder.cfg.max_position_embeddings)
    }

    fn encode(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<Tensor> {
        self.encoder.forward(input_ids, attention_mask)
    }

    fn encoder_cost(&self, shape: [u64; 2]) -> Cost {
        encoder_cost(&self.decoder.cfg, shape, self.decoder.weight_bytes)
    }
}

/// What both halves do over `tokens` rows.
struct Rows<'a> {
    cfg: &'a BartConfig,
    tokens: u64,
    bytes: u64,
}

impl Rows<'_> {
    fn hidden(&self) -> u64 {
        self.cfg.d_model as u64
    }

    fn linear(&self, input: u64, output: u64) -> Cost {
        cost::linear(self.tokens, input, output, true, self.bytes)
    }

    /// Query, key or value.
    fn projection(&self) -> Cost {
        self.linear(self.hidden(), self.hidden())
    }

    fn norm(&self) -> Cost {
        cost::norm(Norm::Layer, self.tokens, self.hidden(), self.bytes)
    }

    /// Tokens and positions looked up, scaled and added, and the norm.
    fn embeddings(&self) -> Cost {
        let flops = 1 + u64::from(self.cfg.scale_embedding);
        cost::embedding(self.tokens, self.hidden(), self.bytes) * 2
            + cost::elementwise(self.tokens * self.hidden(), flops)
            + self.norm()
    }

    /// A product back to the stream, which is added, and the norm of this half.
    fn output(&self, input: u64) -> Cost {
        self.linear(input, self.hidden()) + cost::elementwise(self.tokens * self.hidden(), 1) + self.norm()
    }

    fn feed_forward(&self, inner: usize) -> Cost {
        let inner = inner as u64;
        self.linear(self.hidden(), inner) + cost::elementwise(self.tokens * inner, 1) + self.output(inner)
    }

    /// Attention of `heads` heads.
    fn attention(&self, heads: usize, batch: u64, cached: u64, visible_pairs: u64) -> Cost {
        let heads = heads as u64;
        let (head_dim, queries) = (self.hidden() / heads, self.tokens / batch);
        cost::Attention { batch, heads, kv_heads: heads, head_dim, queries, cached, visible_pairs }.cost(self.bytes)
    }

    /// After the last layer.
    fn last_norm(&self) -> Cost {
        if self.cfg.pre_norm { self.norm() } else { Cost::default() }
    }
}

/// FLOPs and bytes of the encoder over (batch, seq) tokens, all of which exist.
pub fn encoder_cost(cfg: &BartConfig, [batch, seq]: [u64; 2], bytes: u64) -> Cost {
    let rows = Rows { cfg, tokens: batch * seq, bytes };
    let layer = rows.projection() * 3 // query, key and value
        + rows.attention(cfg.encoder_attention_heads, batch, 0, cost::full_pairs(seq, seq))
        + rows.output(rows.hidden())
        + rows.feed_forward(cfg.encoder_ffn_dim);
    rows.embeddings() + layer * cfg.encoder_layers as u64 + rows.last_norm()
}

/// FLOPs and bytes of one pass of the decoder that sees `states` states an item; `bias` says whether the logits have
/// one.
pub fn decoder_cost(cfg: &BartConfig, bias: bool, pass: Pass, states: u64, bytes: u64) -> Cost {
    let Pass { batch, seq, cached, logits } = pass;
    let rows = Rows { cfg, tokens: batch * seq, bytes };
    let attention = |cached, pairs| rows.attention(cfg.decoder_attention_heads, batch, cached, pairs);
    // keys and values of the states: made in the first pass, read in the others
    let (made, read) = match cached {
        0 => (Rows { cfg, tokens: batch * states, bytes }.projection() * 2, 0),
        _ => (Cost::default(), states),
    };
    let self_attention = rows.projection() * 3 // query, key and value
        + attention(cached, cost::causal_pairs(seq, cached))
        + rows.output(rows.hidden());
    let cross_attention =
        rows.projection() + made + attention(read, cost::full_pairs(seq, states)) + rows.output(rows.hidden());
    rows.embeddings()
        + (self_attention + cross_attention + rows.feed_forward(cfg.decoder_ffn_dim)) * cfg.decoder_layers as u64
        + rows.last_norm()
        + cost::linear(batch * logits, rows.hidden(), cfg.vocab_size as u64, bias, bytes)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use roofbench_core::session::{Call, Unobserved};
    use roofbench_core::weights::Weights;
    use serde_json::Value;

    use super::*;

    fn spec(changes: &[(&str, Value)]) -> ModelSpec {
        let mut config = json!({
            "vocab_size": 7, "d_model": 4, "max_position_embeddings": 6, "encoder_layers": 1,
            "encoder_attention_heads": 2, "encoder_ffn_dim": 5, "decoder_layers": 1, "decoder_attention_heads": 2,
            "decoder_ffn_dim": 5,
        });
        for (field, value) in changes {
            config[*field] = value.clone();
        }
        ModelSpec::new("bart", "BartForConditionalGeneration", config)
    }

    fn weights(spec: &ModelSpec) -> Weights {
        let source = crate::Source::Synthetic { seed: 0 };
        Weights::open(&source, aliases(spec), &spec.class, &Default::default()).unwrap()
    }

    fn call(method: &str, inputs: &[(&str, Vec<i64>)]) -> Call {
        let row = |ids: &Vec<i64>| Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap();
        let inputs = inputs.iter().map(|(name, ids)| ((*name).to_owned(), row(ids))).collect();
        Call { method: method.into(), inputs, ..Default::default() }
    }

    #[test]
    fn fields_left_out_have_the_defaults_of_the_class() {
        let cfg = BartConfig::from_spec(&ModelSpec { config: json!({}), ..spec(&[]) }).unwrap();
        assert_eq!((cfg.vocab_size, cfg.d_model, cfg.encoder_layers, cfg.decoder_ffn_dim), (50265, 1024, 12, 4096));
        assert_eq!((cfg.scale_embedding, cfg.activation_function), (false, Activation::Gelu));
    }

    #[test]
    fn configs_that_are_refused_or_malformed_name_the_field() {
        let message = |field: &str, value: Value| {
            BartConfig::from_spec(&spec(&[(field, value)])).err().map(|e| e.to_string()).unwrap_or_default()
        };
        assert!(
            message("tie_word_embeddings", json!(false)).contains("`tie_word_embeddings` = false is not supported")
        );
        assert!(message("decoder_attention_heads", json!(3)).contains("multiple of decoder_attention_heads, 3"));
        assert!(message("encoder_layers", json!(0)).contains("`encoder_layers`: 0 is not in"));
        assert!(message("activation_function", json!("maxout")).contains("`activation_function`"));
    }

    #[test]
    fn a_checkpoint_of_the_base_class_has_no_bias() {
        let has_bias = |spec: ModelSpec| {
            let weights = weights(&spec);
            BartModel::load(&spec, weights.var_builder(DType::F32, &Device::Cpu)).unwrap();
            weights.requested().contains_key("final_logits_bias")
        };
        assert!(has_bias(spec(&[])));
        assert!(!has_bias(spec(&[("architectures", json!(["BartModel"]))])));
    }

    #[test]
    fn the_decoder_reads_the_encoders_tokens_where_it_has_none() {
        let spec = spec(&[("decoder_start_token_id", json!(5))]);
        let mut session = crate::load(&spec, &weights(&spec)).unwrap();
        let mut logits = |call: Call| {
            let outputs = session.call(&call, &mut Unobserved).unwrap();
            outputs["logits"].to_vec3::<f32>().unwrap()
        };
        let input_ids = ("input_ids", vec![1, 2, 3]);
        let shifted = logits(call("forward", &[input_ids.clone(), ("decoder_input_ids", vec![5, 1, 2])]));
        assert_eq!(logits(call("forward", &[input_ids])), shifted);
    }

    #[test]
    fn generation_ends_as_the_class_has_it_and_stays_within_its_positions() {
        let spec = spec(&[]);
        let mut session = crate::load(&spec, &weights(&spec)).unwrap();
        let mut run = |new_tokens: u64, prompt: Option<Vec<i64>>| {
            let mut inputs = vec![("input_ids", vec![1, 2, 3])];
            inputs.extend(prompt.map(|ids| ("decoder_input_ids", ids)));
            let mut call = call("generate", &inputs);
            call.arguments.insert("max_new_tokens".into(), new_tokens.into());
            call.arguments.insert("min_new_tokens".into(), new_tokens.into());
            let outputs = session.call(&call, &mut Unobserved).map_err(|error| error.to_string())?;
            Ok::<_, String>(outputs["sequences"].to_vec2::<i64>().unwrap().remove(0))
        };
        let sequence = run(3, None).unwrap();
        assert_eq!((sequence.len(), sequence[0], sequence[3]), (4, 2, 2)); // start, and end at the length
        assert_eq!(run(2, Some(vec![4])).unwrap()[..2], [2, 4]); // behind the start token
        assert_eq!(run(2, Some(vec![2, 4])).unwrap()[..2], [2, 4]); // which is not put twice
        assert!(run(7, None).unwrap_err().contains("comes to 7 positions, the model has 6"));
    }

    #[test]
    fn inputs_that_do_not_fit_are_named() {
        let spec = spec(&[]);
        let mut session = crate::load(&spec, &weights(&spec)).unwrap();
        let mut message = |call: Call| session.call(&call, &mut Unobserved).unwrap_err().to_string();
        let input_ids = ("input_ids", vec![1, 2, 3]);
        let mask = ("decoder_attention_mask", vec![1, 1]);
        let error = message(call("forward", &[input_ids.clone(), mask.clone()]));
        assert!(error.starts_with("input `decoder_attention_mask`: goes with decoder_input_ids"), "{error}");
        let error = message(call("forward", &[input_ids.clone(), mask, ("decoder_input_ids", vec![1])]));
        assert!(error.contains("[1, 2], decoder_input_ids have [1, 1]"), "{error}");
        let error = message(call("forward", &[("input_ids", vec![1; 7])]));
        assert!(error.contains("comes to 7 positions, the encoder has 6"), "{error}");
        let error = message(call("generate", &[input_ids, ("decoder_input_ids", vec![9])]));
        assert!(error.contains("`decoder_input_ids`: element 0 is 9, beyond vocab_size = 7"), "{error}");
    }

    /// Steps of MBart's decoder equal one pass, and what they cost is what the blocks counted.
    #[test]
    fn normalised_before_each_half() {
        let spec = spec(&[("scale_embedding", json!(true))]);
        let cfg = BartConfig { pre_norm: true, ..BartConfig::from_spec(&spec).unwrap() };
        let weights = weights(&spec);
        let vb = weights.var_builder(DType::F32, &Device::Cpu).pp("decoder");
        let (embed_tokens, lm_head) = Embedding::load_tied(7, 4, vb.pp("embed_tokens")).unwrap();
        let decoder = BartDecoder::load(&cfg, embed_tokens, lm_head, vb).unwrap();
        assert!(weights.requested().contains_key("decoder.layer_norm.weight"));
        let states = Tensor::randn(0f32, 1.0, (2, 3, 4), &Device::Cpu).unwrap();
        let encoded = || Encoded::new(states.clone(), None, 1).unwrap();
        let ids = Tensor::new(&[[1i64, 2, 3], [4, 5, 6]], &Device::Cpu).unwrap();
        let pass = |ids: &Tensor, decoding: &mut Decoding, encoded: &mut Encoded| {
            let of = |x| decoder.logits(&decoder.decode(x, decoding, encoded)?);
            let (logits, recorded) = roofbench_nn::cost::record(|| decoder.embed(ids).and_then(of));
            (logits.unwrap(), recorded.flops)
        };
        let (whole, flops) = pass(&ids, &mut Decoding::once(2, 3, None, &Device::Cpu).unwrap(), &mut encoded());
        assert_eq!(flops, decoder.cost(Pass { batch: 2, seq: 3, cached: 0, logits: 3 }, 3).flops);
        let (mut decoding, mut encoded) = (decoder.shape().decoding(2, 3, &spec).unwrap(), encoded());
        for at in 0..3 {
            decoding.advance(1).unwrap();
            let (step, flops) = pass(&ids.narrow(1, at, 1).unwrap(), &mut decoding, &mut encoded);
            assert_eq!(flops, decoder.cost(Pass { batch: 2, seq: 1, cached: at as u64, logits: 1 }, 3).flops);
            let difference = (step - whole.narrow(1, at, 1).unwrap()).unwrap().abs().unwrap();
            assert!(difference.max_all().unwrap().to_scalar::<f32>().unwrap() < 1e-5);
        }
    }

    /// One layer each, width 4, 2 heads of 2, inner 5, vocabulary 7; 2 items of 3 tokens and 5 states.
    #[test]
    fn cost_by_hand() {
        let cfg = BartConfig::from_spec(&spec(&[])).unwrap();
        let norm = |rows: u64| 7 * rows * 4;
        let linear = |rows: u64, input: u64, output: u64| 2 * rows * input * output + rows * output;
        let attention = |pairs: u64| 2 * 2 * pairs * (4 * 2 + 5);
        let output = |rows: u64, input: u64| linear(rows, input, 4) + rows * 4 + norm(rows);
        let feed_forward = |rows: u64| linear(rows, 4, 5) + rows * 5 + output(rows, 5);
        let embeddings = |rows: u64| rows * 4 + norm(rows);
        let self_attention = |rows: u64, pairs: u64| linear(rows, 4, 12) + attention(pairs) + output(rows, 4);
        let encoder = encoder_cost(&cfg, [2, 5], 4);
        assert_eq!(encoder.flops, embeddings(10) + self_attention(10, 25) + feed_forward(10));

        let first = decoder_cost(&cfg, true, Pass { batch: 2, seq: 3, cached: 0, logits: 1 }, 5, 4);
        let cross_attention = linear(6, 4, 4) + linear(10, 4, 8) + attention(15) + output(6, 4);
        let whole = embeddings(6) + self_attention(6, 6) + cross_attention + feed_forward(6) + linear(2, 4, 7);
        assert_eq!((first.flops, first.kv_bytes), (whole, 0));

        let step = decoder_cost(&cfg, true, Pass { batch: 2, seq: 1, cached: 3, logits: 1 }, 5, 4);
        let cross_attention = linear(2, 4, 4) + attention(5) + output(2, 4);
        let whole = embeddings(2) + self_attention(2, 4) + cross_attention + feed_forward(2) + linear(2, 4, 7);
        assert_eq!((step.flops, step.kv_bytes), (whole, 4 * 2 * 2 * (3 + 5) * 4));
    }
}
