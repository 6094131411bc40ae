//! The parts of a BERT layer by the names of its checkpoints, each normalised behind its residual. BERT has self-attention
//! and feed-forward; text models that look at pictures put attention to their states between.
//! Sources: BERT (arXiv:1810.04805), BLIP's mixture of encoder and decoder (arXiv:2201.12086).

use candle_nn::VarBuilder;
use roofbench_core::cost;
use roofbench_core::session::Result;
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Pattern, SelfAttention};
use roofbench_nn::layer::{CrossAttentionHalf, EncoderLayer, FeedForwardHalf, NormPlacement, SelfAttentionHalf};
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use roofbench_nn::norm::LayerNorm;

/// What a layer is made of; the names are those of config.json.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BertLayerConfig {
    /// Width of the stream.
    pub hidden_size: usize,
    /// Attention heads; they divide `hidden_size`.
    pub num_attention_heads: usize,
    /// Width inside the feed-forward half.
    pub intermediate_size: usize,
    /// Activation of the feed-forward half.
    pub hidden_act: Activation,
    /// Added to the variance in every normalisation.
    pub layer_norm_eps: f64,
}

impl BertLayerConfig {
    /// The sizes that costs follow from, for elements of so many bytes.
    pub fn cost(&self, bytes: u64) -> cost::Layer {
        let [hidden, heads, inner] =
            [self.hidden_size, self.num_attention_heads, self.intermediate_size].map(|size| size as u64);
        cost::Layer { hidden, heads, head_dim: hidden / heads, inner, qkv_bias: true, norm_before: false, bytes }
    }

    fn attention(&self, pattern: Pattern) -> Attention {
        let heads = self.num_attention_heads;
        Attention { heads, kv_heads: heads, head_dim: self.hidden_size / heads, scale: None, pattern }
    }

    /// A product back to the stream from width `input`, and the norm behind it: `dense` and `LayerNorm`.
    fn output(&self, input: usize, vb: VarBuilder) -> Result<(Linear, LayerNorm)> {
        let norm = LayerNorm::load(self.hidden_size, self.layer_norm_eps, vb.pp("LayerNorm"))?;
        Ok((Linear::load(input, self.hidden_size, true, vb.pp("dense"))?, norm))
    }

    /// Self-attention: `query`, `key` and `value` under `inner` of `vb` (BERT's `self`; the Q-Former says `attention`), and
    /// `output`. `some_rows`: of a last layer, of which some rows alone will be wanted.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn self_attention(
        &self,
        pattern: Pattern,
        inner: &str,
        some_rows: bool,
        vb: VarBuilder,
    ) -> Result<SelfAttentionHalf> {
        let load = if some_rows { SelfAttention::load_for_rows } else { SelfAttention::load };
        let names = ["query", "key", "value"];
        let attention = load(self.hidden_size, self.attention(pattern), names, true, vb.pp(inner))?;
        let (output, norm) = self.output(self.hidden_size, vb.pp("output"))?;
        Ok(SelfAttentionHalf::new(attention, output, norm, NormPlacement::Behind))
    }

    /// Attention to states of width `states`, likewise.
    ///
    /// # Errors
    /// As there.
    pub fn cross_attention(&self, states: usize, inner: &str, vb: VarBuilder) -> Result<CrossAttentionHalf> {
        let (hidden, part) = (self.hidden_size, vb.pp(inner));
        let query = Linear::load(hidden, hidden, true, part.pp("query"))?;
        let key_value = Linear::load_fused(states, &[("key", hidden), ("value", hidden)], true, part)?;
        let (output, norm) = self.output(hidden, vb.pp("output"))?;
        let attention = self.attention(Pattern::Full);
        Ok(CrossAttentionHalf::new([query, key_value, output], attention, norm, NormPlacement::Behind))
    }

    /// The feed-forward half: `dense` under the first of `names` (BERT's are `intermediate` and `output`), `dense` and
    /// `LayerNorm` under the second.
    ///
    /// # Errors
    /// As there.
    pub fn feed_forward(&self, names: [&str; 2], vb: VarBuilder) -> Result<FeedForwardHalf> {
        let inner = self.intermediate_size;
        let fc1 = Linear::load(self.hidden_size, inner, true, vb.pp(names[0]).pp("dense"))?;
        let (fc2, norm) = self.output(inner, vb.pp(names[1]))?;
        Ok(FeedForwardHalf::new(Mlp::new(fc1, self.hidden_act, fc2)?, norm, NormPlacement::Behind))
    }

    /// A layer of an encoder.
    ///
    /// # Errors
    /// As there.
    pub fn encoder_layer(&self, some_rows: bool, vb: VarBuilder) -> Result<EncoderLayer> {
        Ok(EncoderLayer {
            attention: self.self_attention(Pattern::Full, "self", some_rows, vb.pp("attention"))?,
            feed_forward: self.feed_forward(["intermediate", "output"], vb)?,
        })
    }
}
