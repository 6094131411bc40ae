//! The Q-Former of BLIP-2 and InstructBLIP: BERT layers in which a few learned queries, with words beside them or without,
//! look at the states of a picture in every other layer.
//! Sources: BLIP-2 (arXiv:2301.12597), InstructBLIP (arXiv:2305.06500). Mirrors `transformers.Blip2QFormerModel` and
//! `InstructBlipQFormerModel`.

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::cost::{self, AttentionRows, Cost, Norm};
use roofbench_core::inputs::{Inputs, in_range, zero_or_one};
use roofbench_core::session::{ModelSpec, Result, SessionError};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Mask, Pattern};
use roofbench_nn::cross_attention::Encoded;
use roofbench_nn::embedding::Embedding;
use roofbench_nn::layer::{CrossAttentionHalf, FeedForwardHalf, SelfAttentionHalf};
use roofbench_nn::norm::LayerNorm;
use roofbench_text::models::bert_layer::BertLayerConfig;
use roofbench_vision::models::activation_dtype;
use serde::Deserialize;

use super::vision_tower::Pixels;

/// The part of `qformer_config` that shapes the computation; field names are the file's own, and what it leaves out is as
/// `transformers.Blip2QFormerConfig` has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct QFormerConfig {
    /// Distinct words.
    pub vocab_size: usize,
    /// Width of the stream.
    pub hidden_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads; they divide `hidden_size`.
    pub num_attention_heads: usize,
    /// Width inside the feed-forward half.
    pub intermediate_size: usize,
    /// Activation of the feed-forward half.
    pub hidden_act: Activation,
    /// Longest sequence of words.
    pub max_position_embeddings: usize,
    /// Added to the variance in every normalisation.
    pub layer_norm_eps: f64,
    /// Every so many layers, from the first on, queries look at the picture.
    pub cross_attention_frequency: usize,
    /// Layers have a feed-forward half for words; those of InstructBLIP have it, whatever the file says.
    pub use_qformer_text_input: bool,
    /// Width of a picture's states: the tower's, whatever the file says.
    #[serde(skip)]
    pub states: usize,
}

impl Default for QFormerConfig {
    fn default() -> Self {
        Self {
            vocab_size: 30522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            max_position_embeddings: 512,
            layer_norm_eps: 1e-12,
            cross_attention_frequency: 2,
            use_qformer_text_input: false,
            states: 0,
        }
    }
}

impl QFormerConfig {
    /// Reads and checks `qformer_config`, which is all of `spec`, of a Q-Former that looks at states of width `states`.
    ///
    /// # Errors
    /// Names the field that is malformed, contradicts another, or changes the result in a way that isn't supported.
    pub fn from_spec(spec: &ModelSpec, states: usize) -> Result<Self, SessionError> {
        let cfg = Self { states, ..spec.parse_config()? };
        config::sizes(&[
            ("vocab_size", cfg.vocab_size),
            ("hidden_size", cfg.hidden_size),
            ("num_hidden_layers", cfg.num_hidden_layers),
            ("num_attention_heads", cfg.num_attention_heads),
            ("intermediate_size", cfg.intermediate_size),
            ("max_position_embeddings", cfg.max_position_embeddings),
            ("cross_attention_frequency", cfg.cross_attention_frequency),
        ])?;
        config::multiple(("hidden_size", cfg.hidden_size), ("num_attention_heads", cfg.num_attention_heads))?;
        config::not_negative(&[("layer_norm_eps", cfg.layer_norm_eps)])?;
        config::refuse_unless(spec, "position_embedding_type", &["absolute".into()])?;
        Ok(cfg)
    }

    fn layer(&self) -> BertLayerConfig {
        BertLayerConfig {
            hidden_size: self.hidden_size,
            num_attention_heads: self.num_attention_heads,
            intermediate_size: self.intermediate_size,
            hidden_act: self.hidden_act,
            layer_norm_eps: self.layer_norm_eps,
        }
    }

    fn looks(&self, layer: usize) -> bool {
        layer.is_multiple_of(self.cross_attention_frequency)
    }

    /// FLOPs and bytes of a pass over `queries` queries and `words` words an item, of which the former look at `states`
    /// states.
    pub fn cost(&self, batch: u64, [queries, words, states]: [u64; 3], bytes: u64) -> Cost {
        let (layer, hidden, rows) = (self.layer().cost(bytes), self.hidden_size as u64, queries + words);
        let feed_forward = |rows| if rows == 0 { Cost::default() } else { layer.feed_forward(batch * rows) };
        let looking = (0..self.num_hidden_layers).filter(|i| queries > 0 && self.looks(*i)).count() as u64;
        let embeddings = Cost { weight_bytes: queries * hidden * bytes, ..Cost::default() }
            + cost::embedding(batch * words, hidden, bytes) * 2 // words and positions
            + cost::elementwise(batch * words * hidden, 1) // their sum
            + cost::norm(Norm::Layer, batch * rows, hidden, bytes);
        embeddings
            + (layer.self_attention(AttentionRows::full(batch, rows)) + feed_forward(queries) + feed_forward(words))
                * self.num_hidden_layers as u64
            + layer.cross_attention([batch, queries], [states, self.states as u64], true) * looking
    }
}

/// The words of a call, checked.
pub struct Words {
    /// (batch, words), i64.
    pub input_ids: Tensor,
    /// (batch, words) of 0 and 1; with `ahead` places more for what stands before the words.
    pub attention_mask: Option<Tensor>,
}

impl Words {
    /// The words of argument `ids` behind `ahead` places that are no words, and their mask `mask`.
    ///
    /// # Errors
    /// Names the argument that is missing or does not fit.
    pub fn read(
        cfg: &QFormerConfig,
        inputs: &Inputs,
        [ids, mask]: [&str; 2],
        ahead: usize,
    ) -> Result<Self, SessionError> {
        let all = inputs.matrix(ids)?;
        let attention_mask = inputs.matrix_as(mask, (ids, &all))?;
        if let Some(values) = &attention_mask {
            zero_or_one(mask, values)?;
        }
        let (words, limit) = (all.dim(1)?.saturating_sub(ahead), cfg.max_position_embeddings);
        if words == 0 {
            return Err(SessionError::input(ids, format!("holds no words behind {ahead} places of the picture")));
        }
        if words > limit {
            let reason = format!("a sequence of {words} is longer than max_position_embeddings = {limit}; truncate it");
            return Err(SessionError::input(ids, reason));
        }
        let input_ids = all.narrow(1, ahead, words)?.contiguous()?;
        in_range(ids, &input_ids, "vocab_size", cfg.vocab_size)?;
        Ok(Self { input_ids, attention_mask })
    }

    /// The same, of which there is one sequence for each picture; `name` is their argument.
    ///
    /// # Errors
    /// Names both numbers.
    pub fn beside(self, pixels: &Pixels, name: &str) -> Result<Self, SessionError> {
        let ([texts, _], [pictures, _]) = (self.shape(), pixels.shape());
        if texts == pictures {
            return Ok(self);
        }
        let reason = format!("holds {texts} sequences, pixel_values {pictures} pictures; give one for each");
        Err(SessionError::input(name, reason))
    }

    /// The mask with `queries` places before it that exist.
    ///
    /// # Errors
    /// Candle's.
    pub fn mask_behind(&self, queries: usize) -> Result<Option<Tensor>> {
        let batch = self.input_ids.dim(0)?;
        let mask = self.attention_mask.as_ref();
        mask.map(|mask| Tensor::cat(&[&Tensor::ones((batch, queries), DType::I64, mask.device())?, mask], 1))
            .transpose()
    }

    /// Sequences, and words of each.
    pub fn shape(&self) -> [u64; 2] {
        [0, 1].map(|axis| self.input_ids.dims()[axis] as u64)
    }
}

/// Words and their positions, not normalised.
pub struct WordEmbeddings {
    word_embeddings: Embedding,
    position_embeddings: Embedding,
}

impl WordEmbeddings {
    /// Reads the tables at `vb`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(cfg: &QFormerConfig, vb: VarBuilder) -> Result<Self> {
        let table = |rows: usize, name: &str| Embedding::load(rows, cfg.hidden_size, vb.pp(name));
        Ok(Self {
            word_embeddings: table(cfg.vocab_size, "word_embeddings")?,
            position_embeddings: table(cfg.max_position_embeddings, "position_embeddings")?,
        })
    }

    /// # Shapes
    /// → (batch, words, hidden).
    ///
    /// # Errors
    /// Candle's.
    pub fn forward(&self, words: &Words) -> Result<Tensor> {
        let x = self.word_embeddings.forward(&words.input_ids)?;
        let positions = Tensor::arange(0, x.dim(1)? as u32, x.device())?.unsqueeze(0)?;
        roofbench_nn::cost::elementwise(x.elem_count(), 1);
        x.broadcast_add(&self.position_embeddings.forward(&positions)?)
    }
}

struct Layer {
    attention: SelfAttentionHalf,
    crossattention: Option<CrossAttentionHalf>,
    words: Option<FeedForwardHalf>,
    queries: FeedForwardHalf,
}

impl Layer {
    fn load(cfg: &QFormerConfig, i: usize, vb: VarBuilder) -> Result<Self> {
        let layer = cfg.layer();
        let cross = || layer.cross_attention(cfg.states, "attention", vb.pp("crossattention"));
        let words = || layer.feed_forward(["intermediate", "output"], vb.clone());
        Ok(Self {
            attention: layer.self_attention(Pattern::Full, "attention", false, vb.pp("attention"))?,
            crossattention: cfg.looks(i).then(cross).transpose()?,
            words: cfg.use_qformer_text_input.then(words).transpose()?,
            queries: layer.feed_forward(["intermediate_query", "output_query"], vb.clone())?,
        })
    }

    /// The first rows of `x` (batch, rows, hidden) are as many queries as `looking` says, with what they look at; the
    /// others are words.
    fn forward(
        &self,
        i: usize,
        x: &Tensor,
        mask: Option<&Mask>,
        looking: Option<(usize, &mut Encoded)>,
    ) -> Result<Tensor> {
        let x = self.attention.forward(x, mask)?;
        let (rows, queries) = (x.dim(1)?, looking.as_ref().map_or(0, |(queries, _)| *queries));
        let mut parts = Vec::with_capacity(2);
        if let Some((_, encoded)) = looking {
            let x = x.narrow(1, 0, queries)?.contiguous()?;
            let x = match &self.crossattention {
                Some(crossattention) => crossattention.step(i, &x, encoded)?,
                None => x,
            };
            parts.push(self.queries.forward(&x)?);
        }
        if let Some(words) = self.words.as_ref().filter(|_| rows > queries) {
            parts.push(words.forward(&x.narrow(1, queries, rows - queries)?.contiguous()?)?);
        }
        Tensor::cat(&parts, 1)
    }
}

/// The Q-Former with its queries.
pub struct QFormer {
    query_tokens: Tensor, // (1, queries, hidden)
    layernorm: LayerNorm,
    layers: Vec<Layer>,
}

impl QFormer {
    /// Reads `query_tokens` (1, `queries`, hidden) and `qformer` at `vb`, whose norm of the embeddings is called `norm`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(cfg: &QFormerConfig, queries: usize, norm: &str, vb: VarBuilder) -> Result<Self> {
        let (hidden, qformer) = (cfg.hidden_size, vb.pp("qformer"));
        let layer = |i: usize| Layer::load(cfg, i, qformer.pp("encoder.layer").pp(i));
        let dtype = activation_dtype(vb.dtype(), vb.device());
        Ok(Self {
            query_tokens: vb.get((1, queries, hidden), "query_tokens")?.to_dtype(dtype)?,
            layernorm: LayerNorm::load(hidden, cfg.layer_norm_eps, qformer.pp(norm))?,
            layers: (0..cfg.num_hidden_layers).map(layer).collect::<Result<_>>()?,
        })
    }

    /// Queries.
    pub fn queries(&self) -> usize {
        self.query_tokens.dims()[1]
    }

    /// The states of the queries, which look at `states` (batch, states, width) where there are any, and of `words`
    /// (batch, words, hidden) behind them. `attention_mask` (batch, rows) of 0 and 1 says which of all exist.
    ///
    /// # Shapes
    /// → (batch, queries + words, hidden); without states there are no queries.
    ///
    /// # Errors
    /// When shapes do not fit together.
    pub fn forward(
        &self,
        states: Option<&Tensor>,
        words: Option<&Tensor>,
        attention_mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (_, queries, hidden) = self.query_tokens.dims3()?;
        let asked = |states: &Tensor| self.query_tokens.broadcast_as((states.dim(0)?, queries, hidden))?.contiguous();
        let rows: Vec<Tensor> = states.map(asked).transpose()?.into_iter().chain(words.cloned()).collect();
        let mut x = self.layernorm.forward(&Tensor::cat(&rows, 1)?)?;
        let mask = attention_mask.map(Mask::padding).transpose()?.flatten();
        let layers = self.layers.len();
        let mut encoded = states.map(|states| Encoded::new(states.clone(), None, layers)).transpose()?;
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(i, &x, mask.as_ref(), encoded.as_mut().map(|encoded| (queries, encoded)))?;
        }
        Ok(x)
    }
}
