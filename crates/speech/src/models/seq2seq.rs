//! What encoder-decoder models of speech share: layers as BART has them, with a norm before or after each half, and
//! tokens one after another behind an encoder.

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::cost::{self, Cost, Norm, PhaseCost};
use roofbench_core::generation::Generation;
use roofbench_core::session::{ModelSpec, Observer, Phase, Result, SessionError, Tensors};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Mask, Pattern};
use roofbench_nn::cross_attention::Encoded;
use roofbench_nn::decoding::Decoding;
use roofbench_nn::kv_cache::Shape;
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use roofbench_nn::norm::LayerNorm;

/// Sizes and options of the layers of a half of a model.
#[derive(Debug, Clone, Copy)]
pub(super) struct LayerConfig {
    pub(super) layers: usize,
    /// Width of the stream.
    pub(super) hidden: usize,
    /// They divide `hidden`.
    pub(super) heads: usize,
    /// Width inside the feed-forward half.
    pub(super) inner: usize,
    pub(super) activation: Activation,
    pub(super) eps: f64,
    /// Norms stand before each half of a layer instead of after it.
    pub(super) pre_norm: bool,
    /// Keys have a bias, as queries and values do.
    pub(super) key_bias: bool,
    /// Names of the feed-forward half's layers.
    pub(super) dense: [&'static str; 2],
}

impl LayerConfig {
    fn attention(&self, pattern: Pattern) -> Attention {
        Attention { heads: self.heads, kv_heads: self.heads, head_dim: self.hidden / self.heads, scale: None, pattern }
    }

    pub(super) fn norm(&self, vb: VarBuilder) -> Result<LayerNorm> {
        LayerNorm::load(self.hidden, self.eps, vb)
    }

    fn half(&self, vb: VarBuilder) -> Result<Half> {
        Ok(Half { norm: self.norm(vb)?, pre_norm: self.pre_norm })
    }

    fn mlp(&self, vb: VarBuilder) -> Result<Mlp> {
        Mlp::load([self.hidden, self.inner], self.activation, true, self.dense, vb)
    }

    fn linear(&self, vb: VarBuilder) -> Result<Linear> {
        Linear::load(self.hidden, self.hidden, true, vb)
    }

    /// Several projections in one product, a key's missing bias being 0.
    fn fused(&self, names: &[&str], vb: &VarBuilder) -> Result<Linear> {
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for name in names {
            let vb = vb.pp(name);
            weights.push(vb.get((self.hidden, self.hidden), "weight")?);
            biases.push(match *name == "k_proj" && !self.key_bias {
                true => Tensor::zeros(self.hidden, vb.dtype(), vb.device())?,
                false => vb.get(self.hidden, "bias")?,
            });
        }
        Linear::new(&Tensor::cat(&weights, 0)?, Some(&Tensor::cat(&biases, 0)?))
    }

    /// What all layers of an encoder cost over (batch, seq).
    pub(super) fn encoder_cost(&self, [batch, seq]: [u64; 2], bytes: u64) -> Cost {
        let rows = Rows { cfg: self, tokens: batch * seq, bytes };
        let layer = rows.projection() * 3 // query, key and value
            + rows.attention(batch, 0, cost::full_pairs(seq, seq))
            + rows.output(self.hidden as u64)
            + rows.feed_forward();
        layer * self.layers as u64
    }

    /// What all layers of a decoder cost in one pass.
    pub(super) fn decoder_cost(&self, pass: Pass, bytes: u64) -> Cost {
        let Pass { batch, seq, cached, states, made } = pass;
        let rows = Rows { cfg: self, tokens: batch * seq, bytes };
        let (keys, read) = match made {
            true => (Cost::default(), states),
            false => (Rows { cfg: self, tokens: batch * states, bytes }.projection() * 2, 0),
        };
        let output = || rows.output(self.hidden as u64);
        let self_attention =
            rows.projection() * 3 + rows.attention(batch, cached, cost::causal_pairs(seq, cached)) + output();
        let cross_attention =
            rows.projection() + keys + rows.attention(batch, read, cost::full_pairs(seq, states)) + output();
        (self_attention + cross_attention + rows.feed_forward()) * self.layers as u64
    }
}

/// One pass of a decoder, for its cost.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pass {
    pub(super) batch: u64,
    /// Rows of each item.
    pub(super) seq: u64,
    /// Positions before them.
    pub(super) cached: u64,
    /// States of the encoder.
    pub(super) states: u64,
    /// An earlier pass made keys and values of them.
    pub(super) made: bool,
}

/// The rows that one pass goes through.
struct Rows<'a> {
    cfg: &'a LayerConfig,
    tokens: u64,
    bytes: u64,
}

impl Rows<'_> {
    fn hidden(&self) -> u64 {
        self.cfg.hidden as u64
    }

    fn projection(&self) -> Cost {
        cost::linear(self.tokens, self.hidden(), self.hidden(), true, self.bytes)
    }

    fn attention(&self, batch: u64, cached: u64, visible_pairs: u64) -> Cost {
        let heads = self.cfg.heads as u64;
        let attention = cost::Attention {
            batch,
            heads,
            kv_heads: heads,
            head_dim: self.hidden() / heads,
            queries: self.tokens / batch,
            cached,
            visible_pairs,
        };
        attention.cost(self.bytes)
    }

    /// Back to the stream from `input`: product, residual, the half's norm.
    fn output(&self, input: u64) -> Cost {
        cost::linear(self.tokens, input, self.hidden(), true, self.bytes)
            + cost::elementwise(self.tokens * self.hidden(), 1)
            + cost::norm(Norm::Layer, self.tokens, self.hidden(), self.bytes)
    }

    fn feed_forward(&self) -> Cost {
        let inner = self.cfg.inner as u64;
        cost::linear(self.tokens, self.hidden(), inner, true, self.bytes)
            + cost::elementwise(self.tokens * inner, 1)
            + self.output(inner)
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

/// A layer of an encoder.
pub(super) struct EncoderLayer {
    qkv_proj: Linear,
    attention: Attention,
    out_proj: Linear,
    attention_half: Half,
    mlp: Mlp,
    mlp_half: Half,
}

impl EncoderLayer {
    /// `names` are those of attention and of its norm.
    pub(super) fn load(cfg: &LayerConfig, names: [&str; 2], vb: VarBuilder) -> Result<Self> {
        let attention = vb.pp(names[0]);
        Ok(Self {
            qkv_proj: cfg.fused(&["q_proj", "k_proj", "v_proj"], &attention)?,
            attention: cfg.attention(Pattern::Full),
            out_proj: cfg.linear(attention.pp("out_proj"))?,
            attention_half: cfg.half(vb.pp(names[1]))?,
            mlp: cfg.mlp(vb.clone())?,
            mlp_half: cfg.half(vb.pp("final_layer_norm"))?,
        })
    }

    /// `x` and the result are (batch, seq, hidden); `mask` is asked with the queries, which are as wide.
    pub(super) fn forward(&self, x: &Tensor, mask: impl FnOnce(&Tensor) -> Result<Option<Mask>>) -> Result<Tensor> {
        let x = self.attention_half.around(x, |x, stream| {
            let [q, k, v] = self.attention.split(&self.qkv_proj.forward(x)?)?;
            let attended = self.attention.forward(&q, &k, &v, mask(&q)?.as_ref())?;
            self.out_proj.forward_add(&attended, stream)
        })?;
        self.mlp_half.around(&x, |x, stream| self.mlp.forward_add(x, stream))
    }
}

/// A layer of a decoder that attends to an encoder's states.
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
    fn load(cfg: &LayerConfig, vb: VarBuilder) -> Result<Self> {
        let (self_attn, encoder_attn) = (vb.pp("self_attn"), vb.pp("encoder_attn"));
        Ok(Self {
            qkv_proj: cfg.fused(&["q_proj", "k_proj", "v_proj"], &self_attn)?,
            self_attn: cfg.attention(Pattern::Causal),
            out_proj: cfg.linear(self_attn.pp("out_proj"))?,
            self_attn_half: cfg.half(vb.pp("self_attn_layer_norm"))?,
            q_proj: cfg.linear(encoder_attn.pp("q_proj"))?,
            kv_proj: cfg.fused(&["k_proj", "v_proj"], &encoder_attn)?,
            encoder_attn: cfg.attention(Pattern::Full),
            encoder_out_proj: cfg.linear(encoder_attn.pp("out_proj"))?,
            encoder_attn_half: cfg.half(vb.pp("encoder_attn_layer_norm"))?,
            mlp: cfg.mlp(vb.clone())?,
            mlp_half: cfg.half(vb.pp("final_layer_norm"))?,
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

/// The layers of a decoder.
pub(super) struct DecoderLayers {
    cfg: LayerConfig,
    layers: Vec<DecoderLayer>,
}

impl DecoderLayers {
    /// `vb` holds the layers by number.
    pub(super) fn load(cfg: LayerConfig, vb: VarBuilder) -> Result<Self> {
        let layer = |i: usize| DecoderLayer::load(&cfg, vb.pp(i));
        Ok(Self { cfg, layers: (0..cfg.layers).map(layer).collect::<Result<_>>()? })
    }

    /// `x` and the result are (batch, seq, hidden).
    pub(super) fn forward(&self, mut x: Tensor, decoding: &mut Decoding, encoded: &mut Encoded) -> Result<Tensor> {
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(i, &x, decoding, encoded)?;
        }
        Ok(x)
    }

    /// Room for `positions` positions of `batch` sequences.
    pub(super) fn decoding(&self, batch: usize, positions: usize, spec: &ModelSpec) -> Result<Decoding> {
        let shape = Shape { batch, positions, width: self.cfg.hidden };
        let dtype = if spec.device.is_cpu() { DType::F32 } else { spec.dtype };
        Decoding::cached(self.layers.len(), shape, None, dtype, &spec.device)
    }

    /// An encoder's states (batch, states, hidden), of which those exist that the mask (batch, states) says.
    pub(super) fn encoded(&self, states: Tensor, mask: Option<&Tensor>) -> Result<Encoded> {
        Encoded::new(states, mask, self.layers.len())
    }
}

/// Tokens one after another behind `prompt`, as [`Generation::run_with`] gives them. `decode` makes the logits (batch,
/// vocab) behind tokens (batch, seq), which `decoding` has room for.
pub(super) fn generate(
    generation: &Generation,
    prompt: &[Vec<i64>],
    mut decoding: Decoding,
    observer: &mut dyn Observer,
    rule: &dyn Fn(&[i64], &mut [f32]),
    device: &candle_core::Device,
    mut decode: impl FnMut(&Tensor, &mut Decoding) -> Result<Tensor>,
) -> Result<Tensors, SessionError> {
    let batch = prompt.len();
    generation.run_with(prompt, observer, rule, |tokens| {
        let ids = tokens.map_or_else(|| prompt.concat(), <[i64]>::to_vec);
        let seq = ids.len() / batch;
        decoding.advance(seq)?;
        Ok(decode(&Tensor::from_vec(ids, (batch, seq), device)?, &mut decoding)?)
    })
}

/// The last row of each item: (batch, seq, hidden) → (batch, hidden).
pub(super) fn last_rows(x: &Tensor) -> Result<Tensor> {
    x.narrow(1, x.dim(1)? - 1, 1)?.contiguous()?.squeeze(1)
}

/// A prefill, and as many steps as there are tokens behind the first.
pub(super) fn phases(prefill: Cost, steps: Cost, new_tokens: u64) -> Vec<PhaseCost> {
    let mut phases = vec![PhaseCost { phase: Phase::Prefill, repeats: 1, cost: prefill }];
    if new_tokens > 1 {
        phases.push(PhaseCost { phase: Phase::Decode, repeats: new_tokens - 1, cost: steps });
    }
    phases
}
