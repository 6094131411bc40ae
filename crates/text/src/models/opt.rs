//! OPT decoder: learned positions, LayerNorm before or behind each half of a layer. The language model of BLIP-2.
//! Source: OPT (arXiv:2205.01068). Mirrors `transformers.OPTForCausalLM`.

use candle_core::Tensor;
use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, Norm};
use roofbench_core::session::{ModelSpec, Result, SessionError};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Pattern};
use roofbench_nn::decoding::Decoding;
use roofbench_nn::embedding::Embedding;
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use roofbench_nn::norm::LayerNorm;
use serde::Deserialize;

use crate::causal::{CausalLm, DecoderShape, Pass};

/// Rows of the position table before that of position 0; the last of them is that of a token which does not exist.
const POSITION_OFFSET: usize = 2;

/// Added to the variance in every normalisation; the class has no field for it.
const LAYER_NORM_EPS: f64 = 1e-5;

/// The part of `config.json` that shapes the computation; field names are the file's own.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct OptConfig {
    /// Distinct tokens.
    pub vocab_size: usize,
    /// Width of the stream.
    pub hidden_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Width inside the feed-forward half.
    pub ffn_dim: usize,
    /// Positions that there are embeddings of.
    pub max_position_embeddings: usize,
    /// Each half of a layer is normalised before it, and the last layer's result behind; else each half behind it.
    pub do_layer_norm_before: bool,
    /// The last layer's result is not normalised, as in checkpoints from before transformers 4.20.1.
    #[serde(rename = "_remove_final_layer_norm")]
    pub remove_final_layer_norm: bool,
    /// Width of the embeddings; `hidden_size` where absent.
    pub word_embed_proj_dim: Option<usize>,
    /// Heads.
    pub num_attention_heads: usize,
    /// Activation of the feed-forward half.
    pub activation_function: Activation,
    /// The products of a layer have biases.
    pub enable_bias: bool,
    /// Normalisations have weight and bias.
    pub layer_norm_elementwise_affine: bool,
    /// The output matrix is that of the embeddings.
    pub tie_word_embeddings: bool,
}

impl Default for OptConfig {
    /// What `transformers.OPTConfig` takes for absent fields.
    fn default() -> Self {
        Self {
            vocab_size: 50_272,
            hidden_size: 768,
            num_hidden_layers: 12,
            ffn_dim: 3072,
            max_position_embeddings: 2048,
            do_layer_norm_before: true,
            remove_final_layer_norm: false,
            word_embed_proj_dim: None,
            num_attention_heads: 12,
            activation_function: Activation::Relu,
            enable_bias: true,
            layer_norm_elementwise_affine: true,
            tie_word_embeddings: true,
        }
    }
}

impl OptConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is malformed or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        config::sizes(&[
            ("vocab_size", cfg.vocab_size),
            ("hidden_size", cfg.hidden_size),
            ("num_hidden_layers", cfg.num_hidden_layers),
            ("ffn_dim", cfg.ffn_dim),
            ("max_position_embeddings", cfg.max_position_embeddings),
            ("word_embed_proj_dim", cfg.embedding_width()),
            ("num_attention_heads", cfg.num_attention_heads),
        ])?;
        config::multiple(("hidden_size", cfg.hidden_size), ("num_attention_heads", cfg.num_attention_heads))?;
        Ok(cfg)
    }

    /// Width of the embeddings.
    pub fn embedding_width(&self) -> usize {
        self.word_embed_proj_dim.unwrap_or(self.hidden_size)
    }

    fn has_projections(&self) -> bool {
        self.embedding_width() != self.hidden_size
    }

    fn has_final_norm(&self) -> bool {
        self.do_layer_norm_before && !self.remove_final_layer_norm
    }

    fn attention(&self) -> Attention {
        let (heads, head_dim) = (self.num_attention_heads, self.hidden_size / self.num_attention_heads);
        Attention { heads, kv_heads: heads, head_dim, scale: None, pattern: Pattern::Causal }
    }

    fn norm(&self, vb: VarBuilder) -> Result<LayerNorm> {
        if self.layer_norm_elementwise_affine {
            return LayerNorm::load(self.hidden_size, LAYER_NORM_EPS, vb);
        }
        LayerNorm::new(&Tensor::ones(self.hidden_size, vb.dtype(), vb.device())?, None, LAYER_NORM_EPS)
    }
}

struct DecoderLayer {
    norm_before: bool,
    self_attn_layer_norm: LayerNorm,
    qkv_proj: Linear,
    attention: Attention,
    out_proj: Linear,
    final_layer_norm: LayerNorm,
    mlp: Mlp,
}

impl DecoderLayer {
    fn load(cfg: &OptConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, bias, attn) = (cfg.hidden_size, cfg.enable_bias, vb.pp("self_attn"));
        let qkv = ["q_proj", "k_proj", "v_proj"].map(|name| (name, hidden));
        Ok(Self {
            norm_before: cfg.do_layer_norm_before,
            self_attn_layer_norm: cfg.norm(vb.pp("self_attn_layer_norm"))?,
            qkv_proj: Linear::load_fused(hidden, &qkv, bias, attn.clone())?,
            attention: cfg.attention(),
            out_proj: Linear::load(hidden, hidden, bias, attn.pp("out_proj"))?,
            final_layer_norm: cfg.norm(vb.pp("final_layer_norm"))?,
            mlp: Mlp::load([hidden, cfg.ffn_dim], cfg.activation_function, bias, ["fc1", "fc2"], vb)?,
        })
    }

    /// `x` and the result are (batch, seq, hidden).
    fn forward(&self, layer: usize, x: &Tensor, decoding: &mut Decoding) -> Result<Tensor> {
        if self.norm_before {
            let x = self.attend(layer, &self.self_attn_layer_norm.forward(x)?, x, decoding)?;
            return self.mlp.forward_add(&self.final_layer_norm.forward(&x)?, &x);
        }
        let x = self.self_attn_layer_norm.forward(&self.attend(layer, x, x, decoding)?)?;
        self.final_layer_norm.forward(&self.mlp.forward_add(&x, &x)?)
    }

    /// Attention of `x` and its output layer, plus `residual`; all are (batch, seq, hidden).
    fn attend(&self, layer: usize, x: &Tensor, residual: &Tensor, decoding: &mut Decoding) -> Result<Tensor> {
        let [q, k, v] = self.attention.split(&self.qkv_proj.forward(x)?)?;
        let attended = decoding.attend(layer, &self.attention, [&q, &k, &v], None)?;
        self.out_proj.forward_add(&attended, residual)
    }
}

/// `OPTForCausalLM`. Its embeddings are as wide as [`OptConfig::embedding_width`] says, other than its states.
pub struct OptModel {
    cfg: OptConfig,
    embed_tokens: Embedding,
    project_in: Option<Linear>,
    embed_positions: Embedding,
    layers: Vec<DecoderLayer>,
    final_layer_norm: Option<LayerNorm>,
    project_out: Option<Linear>,
    lm_head: Linear,
    weight_bytes: u64,
}

impl OptModel {
    /// Loads the model of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// As for [`OptConfig::from_spec`], and when a tensor is missing or has another shape.
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        Ok(Self::with_config(OptConfig::from_spec(spec)?, vb)?)
    }

    /// Loads the model of `cfg` from a checkpoint's root, or from where another model's checkpoint holds it.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn with_config(cfg: OptConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, width, decoder) = (cfg.hidden_size, cfg.embedding_width(), vb.pp("model.decoder"));
        let (embed_tokens, lm_head) = if cfg.tie_word_embeddings {
            Embedding::load_tied(cfg.vocab_size, width, decoder.pp("embed_tokens"))?
        } else {
            let embed_tokens = Embedding::load(cfg.vocab_size, width, decoder.pp("embed_tokens"))?;
            (embed_tokens, Linear::load(width, cfg.vocab_size, false, vb.pp("lm_head"))?)
        };
        let projection = |from, to, name: &str| {
            cfg.has_projections().then(|| Linear::load(from, to, false, decoder.pp(name))).transpose()
        };
        let (project_in, project_out) =
            (projection(width, hidden, "project_in")?, projection(hidden, width, "project_out")?);
        let rows = cfg.max_position_embeddings + POSITION_OFFSET;
        let embed_positions = Embedding::load(rows, hidden, decoder.pp("embed_positions"))?;
        let layers = (0..cfg.num_hidden_layers)
            .map(|layer| DecoderLayer::load(&cfg, decoder.pp("layers").pp(layer)))
            .collect::<Result<_>>()?;
        let final_layer_norm = cfg.has_final_norm().then(|| cfg.norm(decoder.pp("final_layer_norm"))).transpose()?;
        let weight_bytes = vb.dtype().size_in_bytes() as u64;
        Ok(Self {
            cfg,
            embed_tokens,
            project_in,
            embed_positions,
            layers,
            final_layer_norm,
            project_out,
            lm_head,
            weight_bytes,
        })
    }
}

impl CausalLm for OptModel {
    fn shape(&self) -> DecoderShape {
        DecoderShape {
            vocab_size: self.cfg.vocab_size,
            layers: self.layers.len(),
            kv_width: self.cfg.hidden_size,
            window: None,
            max_positions: Some(self.cfg.max_position_embeddings),
        }
    }

    fn embed(&self, input_ids: &Tensor) -> Result<Tensor> {
        self.embed_tokens.forward(input_ids)
    }

    fn decode(&self, x: Tensor, decoding: &mut Decoding) -> Result<Tensor> {
        let rows = decoding.counted_position_rows(POSITION_OFFSET as u32)?;
        let positions = self.embed_positions.forward(&rows)?; // (1 or batch, seq, hidden)
        let x = match &self.project_in {
            Some(project_in) => project_in.forward(&x)?,
            None => x,
        };
        roofbench_nn::cost::elementwise(x.elem_count(), 1);
        let mut x = x.broadcast_add(&positions)?; // (batch, seq, hidden)
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(i, &x, decoding)?;
        }
        match &self.final_layer_norm {
            Some(norm) => norm.forward(&x),
            None => Ok(x),
        }
    }

    fn logits(&self, x: &Tensor) -> Result<Tensor> {
        match &self.project_out {
            Some(project_out) => self.lm_head.forward(&project_out.forward(x)?),
            None => self.lm_head.forward(x),
        }
    }

    fn cost(&self, pass: Pass) -> Cost {
        forward_cost(&self.cfg, pass, self.weight_bytes)
    }
}

/// FLOPs and bytes of one pass, all of whose tokens exist.
fn forward_cost(cfg: &OptConfig, pass: Pass, bytes: u64) -> Cost {
    let Pass { batch, seq, cached, logits } = pass;
    let [hidden, width, inner, heads, vocab] =
        [cfg.hidden_size, cfg.embedding_width(), cfg.ffn_dim, cfg.num_attention_heads, cfg.vocab_size]
            .map(|size| size as u64);
    let (tokens, last) = (batch * seq, batch * logits);
    let linear = |input, output| cost::linear(tokens, input, output, cfg.enable_bias, bytes);
    let mut norm = cost::norm(Norm::Layer, tokens, hidden, bytes);
    if !cfg.layer_norm_elementwise_affine {
        norm.weight_bytes = 0;
    }
    let attention = cost::Attention {
        batch,
        heads,
        kv_heads: heads,
        head_dim: hidden / heads,
        queries: seq,
        cached,
        visible_pairs: cost::causal_pairs(seq, cached),
    };
    let project = |rows, input, output| match cfg.has_projections() {
        true => cost::linear(rows, input, output, false, bytes),
        false => Cost::default(),
    };
    let final_norm = if cfg.has_final_norm() { norm } else { Cost::default() };
    let layer = norm * 2
        + linear(hidden, 3 * hidden) // query, key and value
        + attention.cost(bytes)
        + linear(hidden, hidden) + cost::elementwise(tokens * hidden, 1) // and residual
        + linear(hidden, inner) + cost::elementwise(tokens * inner, 1) // and activation
        + linear(inner, hidden) + cost::elementwise(tokens * hidden, 1); // and residual
    cost::embedding(tokens, width, bytes)
        + project(tokens, width, hidden)
        + cost::embedding(seq, hidden, bytes) + cost::elementwise(tokens * hidden, 1) // positions, added
        + layer * cfg.num_hidden_layers as u64
        + final_norm
        + project(last, hidden, width)
        + cost::linear(last, width, vocab, false, bytes)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use roofbench_core::session::{Call, Session, Unobserved};
    use roofbench_core::weights::{HubOptions, Source, Weights};
    use serde_json::{Value, json};

    use super::*;
    use crate::causal::CausalSession;

    fn spec(changes: Value) -> ModelSpec {
        let mut config = json!({
            "vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 12, "num_attention_heads": 2,
            "max_position_embeddings": 16, "eos_token_id": 2, "pad_token_id": 1,
        });
        for (field, value) in changes.as_object().unwrap() {
            config[field] = value.clone();
        }
        ModelSpec::new("opt", "OPTForCausalLM", config)
    }

    fn post_norm() -> Value {
        json!({"do_layer_norm_before": false, "word_embed_proj_dim": 6})
    }

    fn bare() -> Value {
        json!({
            "activation_function": "gelu", "enable_bias": false, "layer_norm_elementwise_affine": false,
            "tie_word_embeddings": false, "_remove_final_layer_norm": true,
        })
    }

    fn session(changes: Value) -> (CausalSession<OptModel>, Weights) {
        let spec = spec(changes);
        let weights = Weights::open(&Source::Synthetic { seed: 0 }, &[], &spec.class, &HubOptions::from_env()).unwrap();
        let model = OptModel::load(&spec, weights.var_builder(DType::F32, &Device::Cpu)).unwrap();
        (CausalSession::new(model, &spec), weights)
    }

    fn call(method: &str, mask: [i64; 5], position_ids: Option<[i64; 5]>) -> Call {
        let both = |second| Tensor::new(&[[1i64, 1, 1, 1, 1], second], &Device::Cpu).unwrap();
        let ids = Tensor::new(&[[3i64, 7, 11, 5, 9], [8, 20, 4, 6, 10]], &Device::Cpu).unwrap();
        let mut inputs: roofbench_core::session::Tensors =
            [("input_ids".to_owned(), ids), ("attention_mask".to_owned(), both(mask))].into();
        if let Some(row) = position_ids {
            inputs.insert("position_ids".to_owned(), Tensor::new(&[row, row], &Device::Cpu).unwrap());
        }
        let arguments = match method {
            "generate" => json!({"max_new_tokens": 6, "min_new_tokens": 6}),
            _ => json!({}),
        };
        Call { method: method.into(), inputs, arguments: arguments.as_object().unwrap().clone() }
    }

    /// Numbers of transformers 5.23.0 on the same synthetic weights: logits of the first three tokens at (item,
    /// position), (0, 4) and (1, 1) with the second item masked as 0 1 1 0 1, and (0, 4) with positions of the call's
    /// own; six greedy tokens behind each item, of which the second is padded on the left.
    #[test]
    fn agrees_with_the_library() {
        for (changes, tensors, expected, sequences) in [
            (
                json!({}),
                36,
                [[0.45159, -0.41621, -0.38607], [0.06122, -0.91544, 1.72423], [0.64617, -0.66134, 0.31068]],
                [[4, 11, 11, 11, 11, 11], [14, 14, 14, 14, 14, 14]],
            ),
            (
                post_norm(),
                36,
                [[-0.24282, 1.20865, -1.70969], [0.29819, 1.63579, -1.01319], [0.24149, 1.00318, -1.21403]],
                [[18, 1, 19, 1, 23, 23], [10, 10, 10, 10, 10, 10]],
            ),
            (
                bare(),
                15,
                [[-0.60133, 3.43822, 0.94382], [2.52966, -0.53754, -0.51816], [0.40704, 1.84983, 1.42669]],
                [[1, 5, 18, 0, 6, 7], [3, 23, 1, 0, 1, 22]],
            ),
        ] {
            let (mut session, weights) = session(changes);
            let masked = [0, 1, 1, 0, 1];
            let mut forward = |positions| {
                let outputs = session.call(&call("forward", masked, positions), &mut Unobserved).unwrap();
                outputs["logits"].to_vec3::<f32>().unwrap()
            };
            let (plain, moved) = (forward(None), forward(Some([0, 2, 4, 6, 8])));
            let found = [&plain[0][4], &plain[1][1], &moved[0][4]];
            for (found, expected) in found.into_iter().zip(expected) {
                assert!(
                    found.iter().zip(expected).all(|(a, b): (&f32, f32)| (a - b).abs() < 2e-5),
                    "{found:?} {expected:?}"
                );
            }
            assert_eq!(weights.requested().len(), tensors);

            let generate = call("generate", [0, 0, 1, 1, 1], None);
            let (made, recorded) = roofbench_nn::cost::record(|| session.call(&generate, &mut Unobserved).unwrap());
            assert_eq!(made["sequences"].narrow(1, 5, 6).unwrap().to_vec2::<i64>().unwrap(), sequences);
            let formula: u64 = session.cost(&generate).unwrap().iter().map(|phase| phase.cost.flops).sum();
            assert_eq!(formula, recorded.flops);
        }
    }

    #[test]
    fn malformed_configs_and_calls_are_named() {
        let message = |changes| OptConfig::from_spec(&spec(changes)).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message(json!({"num_attention_heads": 3})).contains("`hidden_size`: 16 is not a multiple of"));
        assert!(message(json!({"word_embed_proj_dim": 0})).contains("`word_embed_proj_dim`: 0 is not in"));
        assert!(message(json!({"activation_function": "maxout"})).contains("`activation_function`"));
        let mut long = call("generate", [1; 5], None);
        long.arguments.insert("max_new_tokens".into(), 13.into());
        let error = session(json!({})).0.call(&long, &mut Unobserved).unwrap_err().to_string();
        assert!(error.contains("comes to 17 positions, the model has 16"), "{error}");
    }

    /// One layer of two heads of 4 on embeddings of 3; 2 items of 3 tokens behind 5.
    #[test]
    fn cost_by_hand() {
        let sizes = json!({
            "vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1, "ffn_dim": 6, "word_embed_proj_dim": 3,
        });
        let cfg = OptConfig::from_spec(&spec(sizes)).unwrap();
        let cost = forward_cost(&cfg, Pass { batch: 2, seq: 3, cached: 5, logits: 1 }, 2);
        let pairs = 2 * 2 * (3 * 5 + 6); // items, heads, pairs
        let flops = 2 * 6 * 3 * 8 + 6 * 8 // to the width of the stream; positions
            + 3 * 6 * (7 * 8) // norms: 7 per element
            + 2 * 6 * 8 * 24 + 6 * 24
            + 4 * pairs * 4 + 5 * pairs
            + 2 * 6 * 8 * 8 + 6 * 8 + 6 * 8
            + 2 * 6 * 8 * 6 + 6 * 6 + 6 * 6 + 2 * 6 * 6 * 8 + 6 * 8 + 6 * 8
            + 2 * 2 * 8 * 3 + 2 * 2 * 3 * 10;
        assert_eq!(cost.flops, flops);
        let weights = 6 * 3 + 3 * 8 + 3 * 8 + 3 * 16 + 9 * 24 + 9 * 8 + 9 * 6 + 7 * 8 + 8 * 3 + 3 * 10;
        assert_eq!(cost.weight_bytes, 2 * weights);
        assert_eq!(cost.kv_bytes, 2 * 2 * 2 * 5 * 8);
    }
}
