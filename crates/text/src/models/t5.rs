//! T5 encoder and decoder: pre-norm without mean or bias, attention with unscaled scores and a learned bias by relative
//! position, plain or gated feed-forward.
//! Source: T5 (arXiv:1910.10683); gated and untied: arXiv:2002.05202, FLAN (arXiv:2210.11416). Mirrors
//! `transformers.T5ForConditionalGeneration` and `T5EncoderModel`.

use std::collections::BTreeMap;

use candle_core::Tensor;
use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, Norm, PhaseCost};
use roofbench_core::inputs::Inputs;
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Mask, Pattern};
use roofbench_nn::cross_attention::Encoded;
use roofbench_nn::decoding::Decoding;
use roofbench_nn::embedding::Embedding;
use roofbench_nn::kernels::isa;
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::{GatedMlp, Mlp};
use roofbench_nn::norm::RmsNorm;
use roofbench_nn::relative_bias::{Buckets, RelativeBias};
use serde::Deserialize;

use crate::causal::{DecoderShape, Pass};
use crate::seq2seq::{CrossDecoder, Seq2SeqLm, source};

/// The classes that run.
pub const CLASSES: &[&str] = &["T5ForConditionalGeneration", "T5EncoderModel"];

/// Names in published checkpoints. The first is for the encoder alone, the second for it and a tied output matrix.
const RULES: &[AliasRule] = &[
    AliasRule::drop(r"^decoder\.", AliasScope::Always),
    AliasRule::drop(r"^lm_head\.weight$", AliasScope::Always),
    // one matrix with three names
    AliasRule::rename(r"^(encoder|decoder)\.embed_tokens\.weight$", "shared.weight", AliasScope::Always),
    // left over: cross-attention has no positions
    AliasRule::drop(r"\.EncDecAttention\.relative_attention_bias\.weight$", AliasScope::Always),
];

/// How published checkpoints name the tensors of `spec`.
pub fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    let says_no = |field: &str| spec.config.get(field) == Some(&false.into());
    match spec.class.as_str() {
        "T5EncoderModel" => RULES,
        _ if says_no("tie_word_embeddings") || says_no("scale_decoder_outputs") => &RULES[2..],
        _ => &RULES[1..],
    }
}

/// The part of `config.json` that shapes the computation; field names are the file's own, and what it leaves out is as
/// `transformers.T5Config` has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct T5Config {
    /// Distinct tokens.
    pub vocab_size: usize,
    /// Width of the stream.
    pub d_model: usize,
    /// Width of a head, of whatever share of `d_model`.
    pub d_kv: usize,
    /// Width inside the feed-forward half.
    pub d_ff: usize,
    /// Layers of the encoder.
    pub num_layers: usize,
    /// Layers of the decoder; as many as the encoder's where absent.
    pub num_decoder_layers: Option<usize>,
    /// Heads of every attention.
    pub num_heads: usize,
    /// Distinct biases of a head.
    pub relative_attention_num_buckets: usize,
    /// From this distance on all positions have one bias.
    pub relative_attention_max_distance: usize,
    /// Added to the mean square in every normalisation.
    pub layer_norm_epsilon: f64,
    /// Activation of the feed-forward half, behind `gated-` where it is gated.
    pub feed_forward_proj: String,
    /// What counts where it differs from `feed_forward_proj`, as in the FLAN-T5 of BLIP-2.
    pub dense_act_fn: Option<Activation>,
    /// The same.
    pub is_gated_act: Option<bool>,
    /// The output matrix is that of the embeddings: unless `false`.
    pub tie_word_embeddings: Option<bool>,
    /// The decoder's states are scaled by d_model^-0.5; as `tie_word_embeddings` says where absent.
    pub scale_decoder_outputs: Option<bool>,
    /// What the decoder's parts are called in a checkpoint; no field of the file.
    #[serde(skip)]
    pub names: Names,
}

/// What the parts of a decoder are called in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Names {
    /// The layers.
    pub layers: &'static str,
    /// Of a layer: self-attention, cross-attention and feed-forward.
    pub halves: [&'static str; 3],
    /// The products of the first two.
    pub attention: [&'static str; 2],
    /// Query, key, value and output.
    pub products: [&'static str; 4],
}

impl Default for Names {
    fn default() -> Self {
        Self {
            layers: "block",
            halves: ["layer.0", "layer.1", "layer.2"],
            attention: ["SelfAttention", "EncDecAttention"],
            products: ["q", "k", "v", "o"],
        }
    }
}

impl Default for T5Config {
    fn default() -> Self {
        Self {
            vocab_size: 32128,
            d_model: 512,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 6,
            num_decoder_layers: None,
            num_heads: 8,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj: "relu".to_owned(),
            dense_act_fn: None,
            is_gated_act: None,
            tie_word_embeddings: None,
            scale_decoder_outputs: None,
            names: Names::default(),
        }
    }
}

impl T5Config {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is malformed or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        cfg.check()?;
        Ok(cfg)
    }

    /// Whether the fields fit together; for a config that is made of another family's.
    ///
    /// # Errors
    /// Names the field that does not.
    pub fn check(&self) -> Result<(), SessionError> {
        let cfg = self;
        config::sizes(&[
            ("vocab_size", cfg.vocab_size),
            ("d_model", cfg.d_model),
            ("d_kv", cfg.d_kv),
            ("d_ff", cfg.d_ff),
            ("num_layers", cfg.num_layers),
            ("num_decoder_layers", cfg.decoder_layers()),
            ("num_heads", cfg.num_heads),
            ("relative_attention_num_buckets", cfg.relative_attention_num_buckets),
            ("relative_attention_max_distance", cfg.relative_attention_max_distance),
        ])?;
        config::not_negative(&[("layer_norm_epsilon", cfg.layer_norm_epsilon)])?;
        cfg.act().map(|_| ())
    }

    /// Layers of the decoder.
    pub fn decoder_layers(&self) -> usize {
        self.num_decoder_layers.unwrap_or(self.num_layers)
    }

    /// Whether the feed-forward half is gated.
    pub fn is_gated(&self) -> bool {
        self.is_gated_act.unwrap_or(self.feed_forward_proj.starts_with("gated"))
    }

    /// Activation of the feed-forward half.
    ///
    /// # Errors
    /// When `feed_forward_proj` is neither an activation nor `gated-` and one.
    pub fn act(&self) -> Result<Activation, SessionError> {
        let name = self.feed_forward_proj.strip_prefix("gated-").unwrap_or(&self.feed_forward_proj);
        // the one name that stands for another
        let named = if self.feed_forward_proj == "gated-gelu" { "gelu_new" } else { name }.parse();
        let named = named.map_err(|error| config::invalid("feed_forward_proj", format!("{error}")))?;
        Ok(self.dense_act_fn.unwrap_or(named))
    }

    /// Whether the decoder's states are scaled before the output matrix.
    pub fn scales_outputs(&self) -> bool {
        self.scale_decoder_outputs.unwrap_or(self.tie_word_embeddings != Some(false))
    }

    /// Whether the checkpoint holds an output matrix of its own. The library's own config.json says that it is tied
    /// even where it is not, and then the file decides; synthetic weights, which have every name, follow the config.
    fn has_own_output(&self, vb: &VarBuilder) -> bool {
        let stored = vb.contains_tensor("lm_head.weight") && !vb.contains_tensor("lm_head.bias");
        self.tie_word_embeddings == Some(false) && vb.contains_tensor("lm_head.weight")
            || !self.scales_outputs() && stored
    }

    /// Width of all heads.
    fn inner(&self) -> usize {
        self.num_heads * self.d_kv
    }

    fn attention(&self, pattern: Pattern) -> Attention {
        let heads = self.num_heads;
        Attention { heads, kv_heads: heads, head_dim: self.d_kv, scale: Some(1.0), pattern }
    }

    fn norm(&self, vb: &VarBuilder, name: &str) -> Result<RmsNorm> {
        RmsNorm::load(self.d_model, self.layer_norm_epsilon, vb.pp(name))
    }

    /// The bias that all layers of a stack share, which the first holds.
    fn relative_bias(&self, bidirectional: bool, vb: &VarBuilder) -> Result<RelativeBias> {
        let buckets = Buckets {
            count: self.relative_attention_num_buckets,
            max_distance: self.relative_attention_max_distance,
            bidirectional,
        };
        let Names { layers, halves, attention, .. } = self.names;
        let first = vb.pp(layers).pp(0).pp(halves[0]).pp(attention[0]);
        RelativeBias::load(buckets, self.num_heads, first.pp("relative_attention_bias"))
    }
}

struct SelfAttention {
    layer_norm: RmsNorm,
    qkv: Linear,
    attention: Attention,
    o: Linear,
}

impl SelfAttention {
    fn load(cfg: &T5Config, pattern: Pattern, vb: VarBuilder) -> Result<Self> {
        let (hidden, inner, products) = (cfg.d_model, cfg.inner(), vb.pp(cfg.names.attention[0]));
        let [q, k, v, o] = cfg.names.products;
        Ok(Self {
            layer_norm: cfg.norm(&vb, "layer_norm")?,
            qkv: Linear::load_fused(hidden, &[(q, inner), (k, inner), (v, inner)], false, products.clone())?,
            attention: cfg.attention(pattern),
            o: Linear::load(inner, hidden, false, products.pp(o))?,
        })
    }

    /// `x` and the result are (batch, seq, hidden); `attend` gets queries, keys and values (batch, seq, inner).
    fn forward(&self, x: &Tensor, attend: impl FnOnce(&Attention, [&Tensor; 3]) -> Result<Tensor>) -> Result<Tensor> {
        let [q, k, v] = self.attention.split(&self.qkv.forward(&self.layer_norm.forward(x)?)?)?;
        self.o.forward_add(&attend(&self.attention, [&q, &k, &v])?, x)
    }
}

struct CrossAttention {
    layer_norm: RmsNorm,
    q: Linear,
    kv: Linear,
    attention: Attention,
    o: Linear,
}

impl CrossAttention {
    fn load(cfg: &T5Config, vb: VarBuilder) -> Result<Self> {
        let (hidden, inner, products) = (cfg.d_model, cfg.inner(), vb.pp(cfg.names.attention[1]));
        let [q, k, v, o] = cfg.names.products;
        Ok(Self {
            layer_norm: cfg.norm(&vb, "layer_norm")?,
            q: Linear::load(hidden, inner, false, products.pp(q))?,
            kv: Linear::load_fused(hidden, &[(k, inner), (v, inner)], false, products.clone())?,
            attention: cfg.attention(Pattern::Full),
            o: Linear::load(inner, hidden, false, products.pp(o))?,
        })
    }

    /// `x` and the result are (batch, seq, hidden).
    fn forward(&self, layer: usize, x: &Tensor, encoded: &mut Encoded) -> Result<Tensor> {
        let q = self.q.forward(&self.layer_norm.forward(x)?)?; // (batch, seq, inner)
        let attended = encoded.attend(layer, &self.attention, &q, &self.kv)?; // (batch, seq, inner)
        self.o.forward_add(&attended, x)
    }
}

enum Dense {
    Plain(Mlp),
    Gated(GatedMlp),
}

struct FeedForward {
    layer_norm: RmsNorm,
    dense: Dense,
}

impl FeedForward {
    fn load(cfg: &T5Config, vb: VarBuilder) -> Result<Self, SessionError> {
        let (sizes, act, dense) = ([cfg.d_model, cfg.d_ff], cfg.act()?, vb.pp("DenseReluDense"));
        let dense = match cfg.is_gated() {
            true => Dense::Gated(GatedMlp::load(sizes, act, false, ["wi_0", "wi_1", "wo"], dense)?),
            false => Dense::Plain(Mlp::load(sizes, act, false, ["wi", "wo"], dense)?),
        };
        Ok(Self { layer_norm: cfg.norm(&vb, "layer_norm")?, dense })
    }

    /// `x` and the result are (batch, seq, hidden).
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let normed = self.layer_norm.forward(x)?;
        match &self.dense {
            Dense::Plain(mlp) => mlp.forward_add(&normed, x),
            Dense::Gated(mlp) => mlp.forward_add(&normed, x),
        }
    }
}

/// The encoder's layers, behind whatever makes the embeddings.
pub struct T5Encoder {
    block: Vec<(SelfAttention, FeedForward)>,
    relative_bias: RelativeBias,
    final_layer_norm: RmsNorm,
}

impl T5Encoder {
    /// Reads `block` and `final_layer_norm` of `vb`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(cfg: &T5Config, vb: VarBuilder) -> Result<Self, SessionError> {
        let block = |i: usize| {
            let vb = vb.pp("block").pp(i).pp("layer");
            Ok((SelfAttention::load(cfg, Pattern::Full, vb.pp(0))?, FeedForward::load(cfg, vb.pp(1))?))
        };
        Ok(Self {
            block: (0..cfg.num_layers).map(block).collect::<Result<_, SessionError>>()?,
            relative_bias: cfg.relative_bias(true, &vb)?,
            final_layer_norm: cfg.norm(&vb, "final_layer_norm")?,
        })
    }

    /// The states of embeddings, of which those exist that `attention_mask` (batch, seq) says.
    ///
    /// # Shapes
    /// (batch, seq, hidden) → (batch, seq, hidden).
    ///
    /// # Errors
    /// When the mask has another shape.
    pub fn forward(&self, x: Tensor, attention_mask: Option<&Tensor>) -> Result<Tensor> {
        let seq = x.dim(1)?;
        let mask = Mask::additive(&self.relative_bias.forward(seq, seq)?)?;
        let mask = match attention_mask {
            Some(attention_mask) => mask.with_padding(attention_mask)?,
            None => mask,
        };
        let mut x = x;
        for (self_attention, feed_forward) in &self.block {
            x = self_attention.forward(&x, |attention, [q, k, v]| attention.forward(q, k, v, Some(&mask)))?;
            x = feed_forward.forward(&x)?;
        }
        self.final_layer_norm.forward(&x)
    }
}

struct DecoderBlock {
    self_attention: SelfAttention,
    cross_attention: CrossAttention,
    feed_forward: FeedForward,
}

/// The decoder with its embeddings and output matrix.
pub struct T5Decoder {
    cfg: T5Config,
    embed_tokens: Embedding,
    block: Vec<DecoderBlock>,
    relative_bias: RelativeBias,
    final_layer_norm: RmsNorm,
    lm_head: Linear,
    weight_bytes: u64,
}

impl T5Decoder {
    /// Reads the layers and `final_layer_norm` of `vb`, by the names of the config.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(
        cfg: &T5Config,
        embed_tokens: Embedding,
        lm_head: Linear,
        vb: VarBuilder,
    ) -> Result<Self, SessionError> {
        let block = |i: usize| {
            let [self_attention, cross_attention, feed_forward] =
                cfg.names.halves.map(|half| vb.pp(cfg.names.layers).pp(i).pp(half));
            Ok(DecoderBlock {
                self_attention: SelfAttention::load(cfg, Pattern::Causal, self_attention)?,
                cross_attention: CrossAttention::load(cfg, cross_attention)?,
                feed_forward: FeedForward::load(cfg, feed_forward)?,
            })
        };
        Ok(Self {
            cfg: cfg.clone(),
            embed_tokens,
            block: (0..cfg.decoder_layers()).map(block).collect::<Result<_, SessionError>>()?,
            relative_bias: cfg.relative_bias(false, &vb)?,
            final_layer_norm: cfg.norm(&vb, "final_layer_norm")?,
            lm_head,
            weight_bytes: vb.dtype().size_in_bytes() as u64,
        })
    }
}

impl CrossDecoder for T5Decoder {
    fn shape(&self) -> DecoderShape {
        DecoderShape {
            vocab_size: self.cfg.vocab_size,
            layers: self.block.len(),
            kv_width: self.cfg.inner(),
            window: None,
            max_positions: None,
        }
    }

    fn embed(&self, input_ids: &Tensor) -> Result<Tensor> {
        self.embed_tokens.forward(input_ids)
    }

    fn decode(&self, x: Tensor, decoding: &mut Decoding, encoded: &mut Encoded) -> Result<Tensor> {
        let mut x = x;
        // of the new positions alone
        let bias = self.relative_bias.forward(decoding.seq(), decoding.past() + decoding.seq())?;
        for (i, block) in self.block.iter().enumerate() {
            let attend = |attention: &Attention, qkv: [&Tensor; 3]| decoding.attend(i, attention, qkv, Some(&bias));
            x = block.self_attention.forward(&x, attend)?;
            x = block.cross_attention.forward(i, &x, encoded)?;
            x = block.feed_forward.forward(&x)?; // (batch, seq, hidden)
        }
        self.final_layer_norm.forward(&x)
    }

    fn logits(&self, x: &Tensor) -> Result<Tensor> {
        if !self.cfg.scales_outputs() {
            return self.lm_head.forward(x);
        }
        roofbench_nn::cost::elementwise(x.elem_count(), 1);
        self.lm_head.forward(&(x * (self.cfg.d_model as f64).powf(-0.5))?)
    }

    fn cost(&self, pass: Pass, states: u64) -> Cost {
        decoder_cost(&self.cfg, pass, states, self.weight_bytes)
    }
}

/// `T5ForConditionalGeneration`.
pub struct T5Model {
    encoder: T5Encoder,
    decoder: T5Decoder,
}

impl T5Model {
    /// Loads the model of `spec`.
    ///
    /// # Errors
    /// As for [`T5Config::from_spec`], and when a tensor is missing or has another shape.
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        Self::with_config(&T5Config::from_spec(spec)?, vb)
    }

    /// Loads the model of `cfg` from a checkpoint's root.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn with_config(cfg: &T5Config, vb: VarBuilder) -> Result<Self, SessionError> {
        let (vocab, hidden, shared) = (cfg.vocab_size, cfg.d_model, vb.pp("shared"));
        let (embed_tokens, lm_head) = match cfg.has_own_output(&vb) {
            true => {
                let lm_head = Linear::load(hidden, vocab, false, vb.pp("lm_head"))?;
                (Embedding::load(vocab, hidden, shared)?, lm_head)
            }
            false => Embedding::load_tied(vocab, hidden, shared)?,
        };
        let encoder = T5Encoder::load(cfg, vb.pp("encoder"))?;
        Ok(Self { encoder, decoder: T5Decoder::load(cfg, embed_tokens, lm_head, vb.pp("decoder"))? })
    }

    /// The encoder's half, for embeddings that are not of tokens alone.
    pub fn encoder(&self) -> &T5Encoder {
        &self.encoder
    }
}

impl Seq2SeqLm for T5Model {
    type Decoder = T5Decoder;

    const TOKENS: &'static [(&'static str, i64)] = TOKENS;

    fn decoder(&self) -> &T5Decoder {
        &self.decoder
    }

    fn max_positions(&self) -> Option<usize> {
        None
    }

    fn encode(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<Tensor> {
        self.encoder.forward(self.decoder.embed(input_ids)?, attention_mask)
    }

    fn encoder_cost(&self, [batch, seq]: [u64; 2]) -> Cost {
        let (cfg, bytes) = (&self.decoder.cfg, self.decoder.weight_bytes);
        cost::embedding(batch * seq, cfg.d_model as u64, bytes) + encoder_cost(cfg, [batch, seq], bytes)
    }
}

/// Token ids of `transformers.T5Config`.
pub(crate) const TOKENS: &[(&str, i64)] = &[("pad_token_id", 0), ("eos_token_id", 1)];

/// `T5EncoderModel`.
pub struct T5EncoderModel {
    cfg: T5Config,
    shared: Embedding,
    encoder: T5Encoder,
    weight_bytes: u64,
    paths: BTreeMap<String, String>,
}

impl T5EncoderModel {
    /// Loads the model of `spec`.
    ///
    /// # Errors
    /// As for [`T5Model::load`].
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let cfg = T5Config::from_spec(spec)?;
        let shared = Embedding::load(cfg.vocab_size, cfg.d_model, vb.pp("shared"))?;
        let encoder = T5Encoder::load(&cfg, vb.pp("encoder"))?;
        let weight_bytes = vb.dtype().size_in_bytes() as u64;
        Ok(Self { cfg, shared, encoder, weight_bytes, paths: isa::paths(&spec.device, spec.dtype) })
    }

    fn read(&self, call: &Call) -> Result<(Tensor, Option<Tensor>), SessionError> {
        source(&Inputs::forward(call, &["input_ids", "attention_mask"], &[])?, self.cfg.vocab_size)
    }
}

impl Session for T5EncoderModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let (input_ids, attention_mask) = self.read(call)?;
        let states = self.encoder.forward(self.shared.forward(&input_ids)?, attention_mask.as_ref())?;
        observer.end(Phase::Forward);
        Ok(Tensors::from([("last_hidden_state".to_owned(), states)]))
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let (batch, seq) = self.read(call)?.0.dims2()?;
        let [batch, seq] = [batch, seq].map(|size| size as u64);
        let embeddings = cost::embedding(batch * seq, self.cfg.d_model as u64, self.weight_bytes);
        let cost = embeddings + encoder_cost(&self.cfg, [batch, seq], self.weight_bytes);
        Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }])
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// What both stacks have in every layer, over `tokens` rows.
struct LayerCost {
    norm: Cost,
    /// Of the queries, keys or values alone.
    projection: Cost,
    /// Back to the stream, which is added.
    output: Cost,
    feed_forward: Cost,
}

impl LayerCost {
    fn new(cfg: &T5Config, tokens: u64, bytes: u64) -> Self {
        let [hidden, inner, d_ff] = [cfg.d_model, cfg.inner(), cfg.d_ff].map(|size| size as u64);
        let linear = |input, output| cost::linear(tokens, input, output, false, bytes);
        let norm = cost::norm(Norm::Rms, tokens, hidden, bytes);
        let residual = cost::elementwise(tokens * hidden, 1);
        // gate and up, activation and product; or one product and the activation
        let gates = 1 + u64::from(cfg.is_gated());
        let feed_forward =
            linear(hidden, gates * d_ff) + cost::elementwise(tokens * d_ff, gates) + linear(d_ff, hidden) + residual;
        Self {
            norm,
            projection: linear(hidden, inner),
            output: linear(inner, hidden) + residual,
            feed_forward: norm + feed_forward,
        }
    }
}

fn attention_cost(cfg: &T5Config, batch: u64, [queries, cached, visible_pairs]: [u64; 3], bytes: u64) -> Cost {
    let [heads, head_dim] = [cfg.num_heads, cfg.d_kv].map(|size| size as u64);
    cost::Attention { batch, heads, kv_heads: heads, head_dim, queries, cached, visible_pairs }.cost(bytes)
}

/// FLOPs and bytes of the encoder over (batch, seq) embeddings, all of which exist. The biases by position, a number
/// per bucket and head, are left out.
pub fn encoder_cost(cfg: &T5Config, [batch, seq]: [u64; 2], bytes: u64) -> Cost {
    let layer = LayerCost::new(cfg, batch * seq, bytes);
    let self_attention = layer.norm
        + layer.projection * 3 // query, key and value
        + attention_cost(cfg, batch, [seq, 0, cost::full_pairs(seq, seq)], bytes)
        + layer.output;
    (self_attention + layer.feed_forward) * cfg.num_layers as u64 + layer.norm
}

/// FLOPs and bytes of one pass of the decoder that sees `states` states an item.
pub fn decoder_cost(cfg: &T5Config, pass: Pass, states: u64, bytes: u64) -> Cost {
    let Pass { batch, seq, cached, logits } = pass;
    let [hidden, vocab] = [cfg.d_model, cfg.vocab_size].map(|size| size as u64);
    let layer = LayerCost::new(cfg, batch * seq, bytes);
    let self_attention = layer.norm
        + layer.projection * 3 // query, key and value
        + attention_cost(cfg, batch, [seq, cached, cost::causal_pairs(seq, cached)], bytes)
        + layer.output;
    // keys and values of the states: made in the first pass, read in the others
    let (made, read) = match cached {
        0 => (LayerCost::new(cfg, batch * states, bytes).projection * 2, 0),
        _ => (Cost::default(), states),
    };
    let cross_attention = layer.norm
        + layer.projection
        + made
        + attention_cost(cfg, batch, [seq, read, cost::full_pairs(seq, states)], bytes)
        + layer.output;
    let scale = if cfg.scales_outputs() { cost::elementwise(batch * logits * hidden, 1) } else { Cost::default() };
    cost::embedding(batch * seq, hidden, bytes)
        + (self_attention + cross_attention + layer.feed_forward) * cfg.decoder_layers() as u64
        + layer.norm
        + scale
        + cost::linear(batch * logits, hidden, vocab, false, bytes)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use serde_json::{Value, json};

    use super::*;

    fn spec(class: &str, config: Value) -> ModelSpec {
        ModelSpec::new("t5", class, config)
    }

    fn read(config: Value) -> T5Config {
        T5Config::from_spec(&spec("T5ForConditionalGeneration", config)).unwrap()
    }

    #[test]
    fn fields_left_out_have_the_defaults_of_the_class() {
        let cfg = read(json!({"num_layers": 4}));
        assert_eq!((cfg.vocab_size, cfg.d_model, cfg.decoder_layers(), cfg.inner()), (32128, 512, 4, 512));
        assert_eq!((cfg.is_gated(), cfg.act().unwrap(), cfg.scales_outputs()), (false, Activation::Relu, true));
        assert_eq!(read(json!({"num_layers": 4, "num_decoder_layers": 2})).decoder_layers(), 2);
    }

    /// As `transformers.T5Config` resolves the names.
    #[test]
    fn activations_by_either_name() {
        let of = |config: Value| {
            let cfg = read(config);
            (cfg.is_gated(), cfg.act().unwrap())
        };
        assert_eq!(of(json!({"feed_forward_proj": "gated-gelu"})), (true, Activation::GeluTanh));
        assert_eq!(of(json!({"feed_forward_proj": "gated-silu"})), (true, Activation::Silu));
        assert_eq!(of(json!({"feed_forward_proj": "gelu"})), (false, Activation::Gelu));
        assert_eq!(of(json!({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"})), (true, Activation::Gelu));
    }

    #[test]
    fn scaling_and_tying() {
        let of = |config: Value| read(config).scales_outputs();
        assert!(of(json!({"tie_word_embeddings": true})));
        assert!(!of(json!({"tie_word_embeddings": false})));
        assert!(!of(json!({"tie_word_embeddings": true, "scale_decoder_outputs": false})));
        let kept = |class: &str, config: Value| aliases(&spec(class, config)).len();
        assert_eq!(kept("T5EncoderModel", json!({})), 4);
        assert_eq!(kept("T5ForConditionalGeneration", json!({})), 3);
        assert_eq!(kept("T5ForConditionalGeneration", json!({"tie_word_embeddings": false})), 2);
    }

    #[test]
    fn malformed_configs_name_the_field() {
        let message = |field: &str, value: Value| {
            let spec = spec("T5ForConditionalGeneration", json!({field: value}));
            T5Config::from_spec(&spec).err().map(|e| e.to_string()).unwrap_or_default()
        };
        assert!(message("d_kv", json!(0)).contains("`d_kv`: 0 is not in"));
        assert!(message("num_decoder_layers", json!(0)).contains("`num_decoder_layers`"));
        assert!(
            message("feed_forward_proj", json!("gated-maxout")).contains("`feed_forward_proj`: activation `maxout`")
        );
        assert!(message("dense_act_fn", json!("maxout")).contains("`dense_act_fn`"));
        assert!(message("layer_norm_epsilon", json!(-1.0)).contains("`layer_norm_epsilon`"));
    }

    /// One layer each, width 4, 2 heads of 3, inner 5, vocabulary 7; 2 items of 3 tokens and 5 states.
    #[test]
    fn cost_by_hand() {
        let sizes = json!({
            "vocab_size": 7, "d_model": 4, "d_kv": 3, "d_ff": 5, "num_layers": 1, "num_heads": 2,
            "feed_forward_proj": "gated-gelu",
        });
        let cfg = read(sizes);
        let norm = |rows: u64| 4 * rows * 4;
        let attention = |pairs: u64| 2 * 2 * pairs * (4 * 3 + 5);
        let output = |rows: u64| 2 * rows * 6 * 4 + rows * 4;
        let feed_forward = |rows: u64| norm(rows) + 2 * rows * 4 * 10 + 2 * rows * 5 + 2 * rows * 5 * 4 + rows * 4;
        let encoder = encoder_cost(&cfg, [2, 5], 4);
        let expected = norm(10) + 2 * 10 * 4 * 18 + attention(25) + output(10) + feed_forward(10) + norm(10);
        assert_eq!(encoder.flops, expected);

        let first = decoder_cost(&cfg, Pass { batch: 2, seq: 3, cached: 0, logits: 1 }, 5, 4);
        let self_attention = norm(6) + 2 * 6 * 4 * 18 + attention(6) + output(6);
        let cross_attention = norm(6) + 2 * 6 * 4 * 6 + 2 * 10 * 4 * 12 + attention(15) + output(6);
        let head = 2 * 4 + 2 * 2 * 4 * 7; // the scaling and the product
        assert_eq!(first.flops, self_attention + cross_attention + feed_forward(6) + norm(6) + head);
        assert_eq!(first.kv_bytes, 0);

        let step = decoder_cost(&cfg, Pass { batch: 2, seq: 1, cached: 3, logits: 1 }, 5, 4);
        let self_attention = norm(2) + 2 * 2 * 4 * 18 + attention(4) + output(2);
        let cross_attention = norm(2) + 2 * 2 * 4 * 6 + attention(5) + output(2);
        assert_eq!(step.flops, self_attention + cross_attention + feed_forward(2) + norm(2) + head);
        assert_eq!(step.kv_bytes, 4 * 2 * 2 * (3 + 5) * 6); // keys and values of 3 positions and 5 states
    }

    /// T5-base: 2 FLOPs per weight of the encoder's layers and token, and attention (arXiv:2001.08361, table 1).
    #[test]
    fn cost_of_a_published_size() {
        let cfg = read(json!({"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}));
        let weights = 12. * (4. * 768. * 768. + 2. * 768. * 3072.);
        let flops = encoder_cost(&cfg, [1, 1], 4).flops as f64;
        assert!((flops / (2. * weights) - 1.).abs() < 1e-2, "{flops:e}");
    }

    #[test]
    fn the_encoder_alone() {
        let sizes = json!({"vocab_size": 7, "d_model": 4, "d_kv": 3, "d_ff": 5, "num_layers": 2, "num_heads": 2});
        let spec = spec("T5EncoderModel", sizes);
        let source = crate::Source::Synthetic { seed: 0 };
        let weights = crate::Weights::open(&source, aliases(&spec), &spec.class, &Default::default()).unwrap();
        let mut session = crate::load(&spec, &weights).unwrap();
        assert!(weights.requested().keys().all(|name| name.starts_with("encoder.") || name == "shared.weight"));
        let input_ids = Tensor::new(&[[1i64, 2, 3], [4, 5, 6]], &Device::Cpu).unwrap();
        let inputs = [("input_ids".to_owned(), input_ids)].into();
        let call = Call { method: "forward".into(), inputs, ..Default::default() };
        let (outputs, recorded) = roofbench_nn::cost::record(|| session.call(&call, &mut crate::Unobserved));
        assert_eq!(outputs.unwrap()["last_hidden_state"].dims(), [2, 3, 4]);
        assert_eq!(session.cost(&call).unwrap()[0].cost.flops, recorded.flops);
    }
}
