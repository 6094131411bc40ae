//! Pix2Struct: a transformer over patches of which a picture has as many as fit, each with its row and column, and a decoder
//! of T5 that writes text.
//! Source: Pix2Struct (arXiv:2210.03347). Mirrors `transformers.Pix2StructForConditionalGeneration`.

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::config::{self, invalid};
use roofbench_core::cost::{self, Cost, Norm};
use roofbench_core::session::{Call, ModelSpec, Result, Session, SessionError};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Mask, Pattern, SelfAttention};
use roofbench_nn::cross_attention::Encoded;
use roofbench_nn::embedding::Embedding;
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::GatedMlp;
use roofbench_nn::norm::RmsNorm;
use roofbench_text::models::t5::{Names, T5Config, T5Decoder};
use roofbench_text::seq2seq::CrossDecoder;
use roofbench_vision::models::activation_dtype;
use serde::Deserialize;

use crate::picture_to_text::{PictureToText, PictureToTextSession};

/// The classes that run.
pub const CLASSES: &[&str] = &["Pix2StructForConditionalGeneration"];

/// For a tied output matrix; google/pix2struct-* hold one of their own.
const TIED: &[AliasRule] =
    &[AliasRule::rename(r"^decoder\.lm_head\.weight$", "decoder.embed_tokens.weight", AliasScope::Always)];

/// How published checkpoints name the tensors of `spec`.
pub(crate) fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    if ties_output(spec) { TIED } else { &[] }
}

/// The outer config decides, whatever the text's says.
fn ties_output(spec: &ModelSpec) -> bool {
    spec.config.get("tie_word_embeddings") == Some(&true.into())
}

/// What the parts of the decoder are called.
const NAMES: Names = Names {
    layers: "layer",
    halves: ["self_attention", "encoder_decoder_attention", "mlp"],
    attention: ["attention", "attention"],
    products: ["query", "key", "value", "output"],
};

/// Tokens where config.json leaves them out.
const TOKENS: [(&str, i64); 3] = [("decoder_start_token_id", 0), ("pad_token_id", 0), ("eos_token_id", 1)];

/// The part of the encoder's config that shapes the computation; field names are the file's own, and what it leaves out
/// is as `transformers.Pix2StructVisionConfig` has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct Pix2StructVisionConfig {
    /// Width of the stream.
    pub hidden_size: usize,
    /// Numbers of a patch.
    pub patch_embed_hidden_size: usize,
    /// Width inside the feed-forward half.
    pub d_ff: usize,
    /// Width of a head, of whatever share of `hidden_size`.
    pub d_kv: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Activation of the feed-forward half.
    pub dense_act_fn: Activation,
    /// Added to the mean square in every normalisation.
    pub layer_norm_eps: f64,
    /// Most rows, and columns, of patches, and one.
    pub seq_len: usize,
}

impl Default for Pix2StructVisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            patch_embed_hidden_size: 768,
            d_ff: 2048,
            d_kv: 64,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            dense_act_fn: Activation::GeluTanh,
            layer_norm_eps: 1e-6,
            seq_len: 4096,
        }
    }
}

impl Pix2StructVisionConfig {
    fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        config::sizes(&[
            ("hidden_size", cfg.hidden_size),
            ("patch_embed_hidden_size", cfg.patch_embed_hidden_size),
            ("d_ff", cfg.d_ff),
            ("d_kv", cfg.d_kv),
            ("num_hidden_layers", cfg.num_hidden_layers),
            ("num_attention_heads", cfg.num_attention_heads),
            ("seq_len", cfg.seq_len),
        ])?;
        config::not_negative(&[("layer_norm_eps", cfg.layer_norm_eps)])?;
        Ok(cfg)
    }

    /// Width of all heads.
    fn inner(&self) -> usize {
        self.num_attention_heads * self.d_kv
    }

    fn norm(&self, vb: VarBuilder) -> Result<RmsNorm> {
        RmsNorm::load(self.hidden_size, self.layer_norm_eps, vb)
    }

    /// FLOPs and bytes of the encoder over (batch, seq) patches, all of which exist.
    fn cost(&self, [batch, seq]: [u64; 2], bytes: u64) -> Cost {
        let [hidden, depth, inner, d_ff, heads] =
            [self.hidden_size, self.patch_embed_hidden_size, self.inner(), self.d_ff, self.num_attention_heads]
                .map(|size| size as u64);
        let tokens = batch * seq;
        let norm = cost::norm(Norm::Rms, tokens, hidden, bytes);
        let residual = cost::elementwise(tokens * hidden, 1);
        let visible_pairs = cost::full_pairs(seq, seq);
        let head_dim = self.d_kv as u64;
        let attention =
            cost::Attention { batch, heads, kv_heads: heads, head_dim, queries: seq, cached: 0, visible_pairs };
        let layer = norm
            + cost::linear(tokens, hidden, 3 * inner, false, bytes) // query, key and value
            + attention.cost(bytes)
            + cost::linear(tokens, inner, hidden, false, bytes)
            + residual
            + norm
            + cost::linear(tokens, hidden, 2 * d_ff, false, bytes) // gate and up
            + cost::elementwise(tokens * d_ff, 2) // activation and product
            + cost::linear(tokens, d_ff, hidden, false, bytes)
            + residual;
        cost::input(tokens * (2 + depth), bytes)
            + cost::linear(tokens, depth, hidden, true, bytes)
            + cost::embedding(tokens, hidden, bytes) * 2 // rows and columns
            + residual * 2 // both added
            + layer * self.num_hidden_layers as u64
            + norm
    }
}

/// The part of the decoder's config that is named otherwise than T5's.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
struct TextConfig {
    vocab_size: usize,
    hidden_size: usize,
    d_kv: usize,
    num_layers: usize,
    num_heads: usize,
    dense_act_fn: Activation,
}

impl Default for TextConfig {
    fn default() -> Self {
        let (vocab_size, hidden_size, dense_act_fn) = (50244, 768, Activation::GeluTanh);
        Self { vocab_size, hidden_size, d_kv: 64, num_layers: 12, num_heads: 12, dense_act_fn }
    }
}

/// T5's config of the decoder.
fn decoder_config(spec: &ModelSpec) -> Result<T5Config, SessionError> {
    config::refuse_unless(spec, "is_decoder", &[true.into()])?;
    let TextConfig { vocab_size, hidden_size, d_kv, num_layers, num_heads, dense_act_fn } = spec.parse_config()?;
    let cfg = T5Config {
        vocab_size,
        d_model: hidden_size,
        d_kv,
        num_layers,
        num_decoder_layers: None,
        num_heads,
        feed_forward_proj: "gated-gelu".to_owned(),
        dense_act_fn: Some(dense_act_fn),
        is_gated_act: Some(true),
        scale_decoder_outputs: Some(false),
        names: NAMES,
        ..spec.parse_config()?
    };
    cfg.check()?;
    if num_heads * d_kv != hidden_size {
        return Err(invalid("hidden_size", format!("{hidden_size} is not num_heads · d_kv = {num_heads} · {d_kv}")));
    }
    Ok(cfg)
}

struct Layer {
    pre_attention_layer_norm: RmsNorm,
    attention: SelfAttention,
    output: Linear,
    pre_mlp_layer_norm: RmsNorm,
    mlp: GatedMlp,
}

impl Layer {
    fn load(cfg: &Pix2StructVisionConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, heads, products) = (cfg.hidden_size, cfg.num_attention_heads, vb.pp("attention"));
        let attention =
            Attention { heads, kv_heads: heads, head_dim: cfg.d_kv, scale: Some(1.0), pattern: Pattern::Full };
        let names = ["query", "key", "value"];
        let sizes = [hidden, cfg.d_ff];
        Ok(Self {
            pre_attention_layer_norm: cfg.norm(vb.pp("pre_attention_layer_norm"))?,
            attention: SelfAttention::load(hidden, attention, names, false, products.clone())?,
            output: Linear::load(cfg.inner(), hidden, false, products.pp("output"))?,
            pre_mlp_layer_norm: cfg.norm(vb.pp("pre_mlp_layer_norm"))?,
            mlp: GatedMlp::load(sizes, cfg.dense_act_fn, false, ["wi_0", "wi_1", "wo"], vb.pp("mlp"))?,
        })
    }

    /// `x` and the result are (batch, patches, hidden).
    fn forward(&self, x: &Tensor, mask: Option<&Mask>) -> Result<Tensor> {
        let attended = self.attention.forward(&self.pre_attention_layer_norm.forward(x)?, mask)?;
        let x = self.output.forward_add(&attended, x)?;
        self.mlp.forward_add(&self.pre_mlp_layer_norm.forward(&x)?, &x)
    }
}

struct Encoder {
    patch_projection: Linear,
    row_embedder: Embedding,
    column_embedder: Embedding,
    layer: Vec<Layer>,
    layernorm: RmsNorm,
}

impl Encoder {
    fn load(cfg: &Pix2StructVisionConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, embeddings) = (cfg.hidden_size, vb.pp("embeddings"));
        let layer = |i: usize| Layer::load(cfg, vb.pp("encoder.layer").pp(i));
        Ok(Self {
            patch_projection: Linear::load(
                cfg.patch_embed_hidden_size,
                hidden,
                true,
                embeddings.pp("patch_projection"),
            )?,
            row_embedder: Embedding::load(cfg.seq_len, hidden, embeddings.pp("row_embedder"))?,
            column_embedder: Embedding::load(cfg.seq_len, hidden, embeddings.pp("column_embedder"))?,
            layer: (0..cfg.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            layernorm: cfg.norm(vb.pp("layernorm"))?,
        })
    }

    /// `x` is (batch, patches, numbers), `places` rows and columns (batch, patches), the result (batch, patches, hidden).
    fn forward(&self, x: &Tensor, places: &[Tensor; 2], mask: Option<&Mask>) -> Result<Tensor> {
        let place = (self.row_embedder.forward(&places[0])? + self.column_embedder.forward(&places[1])?)?;
        roofbench_nn::cost::elementwise(place.elem_count(), 1);
        let x = self.patch_projection.forward_add(x, &place)?;
        let x = self.layer.iter().try_fold(x, |x, layer| layer.forward(&x, mask))?;
        self.layernorm.forward(&x)
    }
}

/// The patches of a call.
pub(crate) struct Patches {
    /// (batch, patches, numbers)
    values: Tensor,
    /// Rows and columns, (batch, patches), i64.
    places: [Tensor; 2],
    /// Those that the encoder sees, (batch, patches) of 0 and 1.
    exist: Option<Tensor>,
    /// Those whose states the decoder sees.
    seen: Option<Tensor>,
}

impl Patches {
    fn read(cfg: &Pix2StructVisionConfig, call: &Call) -> Result<Self, SessionError> {
        let name = "flattened_patches";
        let patches = call.inputs.get(name).ok_or_else(|| SessionError::input(name, "is missing"))?;
        let depth = cfg.patch_embed_hidden_size;
        let (batch, seq) = match *patches.dims() {
            [batch, seq, found] if found == 2 + depth && batch * seq > 0 && patches.dtype().is_float() => (batch, seq),
            _ => {
                let (shape, dtype) = (patches.dims(), patches.dtype());
                let reason = format!(
                    "is {dtype:?} of shape {shape:?}, expected floats (batch, patches, 2 + {depth}), not empty"
                );
                return Err(SessionError::input(name, reason));
            }
        };
        let values = patches.narrow(2, 2, depth)?.contiguous()?;
        let place = |axis: usize| {
            // numbers are cut off, as the class does
            let place = patches.narrow(2, axis, 1)?.squeeze(2)?.to_dtype(DType::F32)?.to_vec2::<f32>()?.concat();
            match place.iter().position(|at| !(*at > -1.0 && *at < cfg.seq_len as f32)) {
                None => {
                    let place: Vec<i64> = place.into_iter().map(|at| at as i64).collect();
                    Ok(Tensor::from_vec(place, (batch, seq), patches.device())?)
                }
                Some(bad) => {
                    let axis = if axis == 0 { "row" } else { "column" };
                    let reason = format!("patch {bad} is in {axis} {}, beyond seq_len = {}", place[bad], cfg.seq_len);
                    Err(SessionError::input(name, reason))
                }
            }
        };
        let places = [place(0)?, place(1)?];
        let (exist, seen) = match call.inputs.get("attention_mask") {
            Some(mask) => {
                let mask = attention_mask(mask, [batch, seq])?;
                (Some(mask.clone()), Some(mask))
            }
            // generation gives the class a mask of ones; without it the encoder looks for what is not 0
            None if call.method == "generate" => (None, None),
            None => {
                let sums = patches.to_dtype(DType::F32)?.sum(2)?;
                (Some(sums.ne(0f32)?.to_dtype(DType::I64)?), None)
            }
        };
        Ok(Self { values, places, exist, seen })
    }
}

/// The mask of a call, numbers of any type, as i64.
fn attention_mask(mask: &Tensor, shape: [usize; 2]) -> Result<Tensor, SessionError> {
    let refuse = |reason: String| Err(SessionError::input("attention_mask", reason));
    if mask.dims() != shape {
        return refuse(format!("has shape {:?}, flattened_patches have {shape:?}", mask.dims()));
    }
    let values = mask.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    match values.iter().position(|value| *value != 0.0 && *value != 1.0) {
        None => Ok(mask.to_dtype(DType::I64)?),
        Some(at) => refuse(format!("element {at} is {}, neither 0 nor 1", values[at])),
    }
}

/// `Pix2StructForConditionalGeneration`.
pub struct Pix2StructModel {
    cfg: Pix2StructVisionConfig,
    encoder: Encoder,
    decoder: T5Decoder,
    spec: ModelSpec,
}

impl Pix2StructModel {
    /// Loads the model of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// Names the config field or the tensor at fault.
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let cfg = config::nested(spec, "vision_config", Pix2StructVisionConfig::from_spec)?;
        let text = config::nested(spec, "text_config", decoder_config)?;
        if cfg.hidden_size != text.d_model {
            let reason = format!("{} is not that of text_config, {}", cfg.hidden_size, text.d_model);
            return Err(invalid("vision_config.hidden_size", reason));
        }
        let (vocab, hidden, part) = (text.vocab_size, text.d_model, vb.pp("decoder"));
        let (embed_tokens, lm_head) = match ties_output(spec) {
            true => Embedding::load_tied(vocab, hidden, part.pp("embed_tokens"))?,
            false => (
                Embedding::load(vocab, hidden, part.pp("embed_tokens"))?,
                Linear::load(hidden, vocab, false, part.pp("lm_head"))?,
            ),
        };
        Ok(Self {
            encoder: Encoder::load(&cfg, vb.pp("encoder"))?,
            decoder: T5Decoder::load(&text, embed_tokens, lm_head, part)?,
            spec: spec.clone(),
            cfg,
        })
    }

    /// The model behind the calls of its class.
    pub(crate) fn session(spec: &ModelSpec, vb: VarBuilder) -> Result<Box<dyn Session>, SessionError> {
        let stated = |name: &str| {
            let text = spec.config.get("text_config").and_then(|text| text.get(name));
            spec.config.get(name).or(text).is_some_and(|id| !id.is_null())
        };
        let tokens = TOKENS.into_iter().filter(|(name, _)| !stated(name));
        let tokens: Vec<_> = tokens.map(|(name, id)| (name, id.into())).collect();
        let model = Self::load(spec, vb)?;
        Ok(Box::new(PictureToTextSession::new(model, &config::with_defaults(spec, &tokens))))
    }
}

impl PictureToText for Pix2StructModel {
    type Decoder = T5Decoder;
    type Pictures = Patches;

    const INPUTS: &'static [&'static str] = &["flattened_patches", "attention_mask"];

    const STARTS_PROMPTS: bool = true;

    fn decoder(&self) -> &T5Decoder {
        &self.decoder
    }

    fn read(&self, call: &Call) -> Result<Patches, SessionError> {
        Patches::read(&self.cfg, call)
    }

    fn shape(patches: &Patches) -> [usize; 2] {
        [0, 1].map(|axis| patches.values.dims()[axis])
    }

    fn encode(&self, patches: &Patches) -> Result<(Tensor, Encoded), SessionError> {
        let dtype = activation_dtype(self.spec.dtype, &self.spec.device);
        let values = patches.values.to_device(&self.spec.device)?.to_dtype(dtype)?;
        let [rows, columns] = &patches.places;
        let places = [rows.to_device(&self.spec.device)?, columns.to_device(&self.spec.device)?];
        let mask = patches.exist.as_ref().map(Mask::padding).transpose()?.flatten();
        let states = self.encoder.forward(&values, &places, mask.as_ref())?; // (batch, patches, hidden)
        let encoded = Encoded::new(states.clone(), patches.seen.as_ref(), self.decoder.shape().layers)?;
        Ok((states, encoded))
    }

    fn encoder_cost(&self, patches: &Patches) -> Cost {
        let shape = Self::shape(patches).map(|size| size as u64);
        self.cfg.cost(shape, self.spec.dtype.size_in_bytes() as u64)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use roofbench_core::session::{Tensors, Unobserved};
    use roofbench_core::weights::{HubOptions, Source, Weights};
    use serde_json::{Value, json};

    use super::*;

    fn tiny() -> Value {
        json!({
            "text_config": {
                "vocab_size": 10, "hidden_size": 4, "d_kv": 2, "d_ff": 6, "num_layers": 1, "num_heads": 2,
                "relative_attention_num_buckets": 4, "relative_attention_max_distance": 8,
            },
            "vision_config": {
                "hidden_size": 4, "patch_embed_hidden_size": 3, "d_ff": 5, "d_kv": 3, "num_hidden_layers": 1,
                "num_attention_heads": 2, "seq_len": 4,
            },
        })
    }

    fn session(config: Value) -> Result<Box<dyn Session>, SessionError> {
        let spec = ModelSpec::new("pix2struct", "Pix2StructForConditionalGeneration", config);
        let weights =
            Weights::open(&Source::Synthetic { seed: 0 }, aliases(&spec), &spec.class, &HubOptions::default())?;
        Pix2StructModel::session(&spec, weights.var_builder(spec.dtype, &spec.device))
    }

    /// Three patches of three numbers, the last of which does not exist.
    fn call(method: &str) -> Call {
        let patches = [[[1f32, 1., 0.1, 0.2, 0.3], [1., 2., 0.4, -0.5, 0.6], [0.; 5]]];
        let inputs = Tensors::from([
            ("flattened_patches".into(), Tensor::new(&patches, &Device::Cpu).expect("patches")),
            ("attention_mask".into(), Tensor::new(&[[1f32, 1., 0.]], &Device::Cpu).expect("a mask")),
            ("decoder_input_ids".into(), Tensor::new(&[[0i64, 5]], &Device::Cpu).expect("ids")),
        ]);
        Call { method: method.into(), inputs, ..Call::default() }
    }

    #[test]
    fn cost_of_a_tiny_case_by_hand() -> Result<(), SessionError> {
        // three patches, 4 wide with 2 heads of 3; two tokens, 4 wide with 2 heads of 2
        let encoder = 2 * 3 * 3 * 4 + 12 + 2 * 12 // patches with bias; rows and columns
            + 4 * 12 + 2 * 3 * 4 * 18 + 2 * 9 * (4 * 3 + 5) + 2 * 3 * 6 * 4 + 12
            + 4 * 12 + 2 * 3 * 4 * 10 + 2 * 15 + 2 * 3 * 5 * 4 + 12
            + 4 * 12;
        let decoder = 4 * 8
            + 2 * 2 * 4 * 12
            + 2 * 3 * (4 * 2 + 5)
            + 2 * 2 * 16
            + 8
            + 4 * 8
            + 2 * 2 * 16
            + 2 * 3 * 4 * 8
            + 2 * 6 * (4 * 2 + 5)
            + 2 * 2 * 16
            + 8
            + 4 * 8
            + 2 * 2 * 4 * 12
            + 2 * 12
            + 2 * 2 * 6 * 4
            + 8
            + 4 * 8
            + 2 * 2 * 4 * 10;
        let (mut session, call) = (session(tiny())?, call("forward"));
        let (outputs, recorded) = roofbench_nn::cost::record(|| session.call(&call, &mut Unobserved));
        assert_eq!(outputs?["logits"].dims(), [1, 2, 10]);
        let flops: Vec<u64> = session.cost(&call)?.iter().map(|phase| phase.cost.flops).collect();
        assert_eq!(flops, [encoder, decoder]);
        assert_eq!(recorded.flops, encoder + decoder);
        Ok(())
    }

    #[test]
    fn without_a_mask_the_encoder_looks_for_what_is_there() -> Result<(), SessionError> {
        let (mut session, mut call) = (session(tiny())?, call("forward"));
        let mut states = |call: &Call, name: &str| {
            let outputs = session.call(call, &mut Unobserved)?;
            Ok::<_, SessionError>(outputs[name].flatten_all()?.to_vec1::<f32>()?)
        };
        let masked = [states(&call, "encoder_last_hidden_state")?, states(&call, "logits")?];
        call.inputs.remove("attention_mask");
        assert_eq!(states(&call, "encoder_last_hidden_state")?, masked[0]);
        assert_ne!(states(&call, "logits")?, masked[1]); // the decoder sees all, as in the library
        Ok(())
    }

    #[test]
    fn generation_starts_with_the_token_of_the_class() -> Result<(), SessionError> {
        for (config, start) in [(tiny(), 0), (with(tiny(), "text_config", "decoder_start_token_id", json!(3)), 3)] {
            let mut call = call("generate");
            call.inputs.remove("decoder_input_ids");
            call.arguments = [("max_new_tokens".to_owned(), json!(2))].into_iter().collect();
            let outputs = session(config)?.call(&call, &mut Unobserved)?;
            assert_eq!(outputs["sequences"].to_vec2::<i64>()?[0][0], start);
        }
        Ok(())
    }

    fn with(mut config: Value, part: &str, field: &str, value: Value) -> Value {
        config[part][field] = value;
        config
    }

    #[test]
    fn what_does_not_fit_is_named() -> Result<(), SessionError> {
        for (part, field, value, start) in [
            ("text_config", "num_heads", json!(3), "`text_config.hidden_size`: 4 is not num_heads"),
            ("text_config", "is_decoder", json!(false), "`text_config.is_decoder` = false is not supported"),
            ("text_config", "d_ff", json!(0), "`text_config.d_ff`: 0 is not in"),
            ("vision_config", "hidden_size", json!(6), "`vision_config.hidden_size`: 6 is not that of text_config"),
            ("vision_config", "dense_act_fn", json!("maxout"), "`vision_config.dense_act_fn`: activation `maxout`"),
        ] {
            let found = session(with(tiny(), part, field, value)).err().map(|error| error.to_string());
            let found = found.unwrap_or_default();
            assert!(found.starts_with(&format!("config.json: {start}")), "{found}");
        }
        let mut session = session(tiny())?;
        let mut message = |name: &str, tensor: Result<Tensor>| {
            let mut call = call("forward");
            call.inputs.insert(name.into(), tensor.expect("a tensor"));
            session.call(&call, &mut Unobserved).err().map(|error| error.to_string()).unwrap_or_default()
        };
        let cpu = &Device::Cpu;
        let patch = |row: f32| Tensor::new(&[[[1f32, 1., 0., 0., 0.], [row, 1., 0., 0., 0.], [0.; 5]]], cpu);
        assert_eq!(message("flattened_patches", patch(3.9)), "");
        assert!(message("flattened_patches", patch(4.0)).contains("patch 1 is in row 4, beyond seq_len = 4"));
        assert!(message("flattened_patches", Tensor::new(&[[[1f32, 1.]]], cpu)).contains("2 + 3"));
        assert!(message("attention_mask", Tensor::new(&[[1f32, 0.5, 0.]], cpu)).contains("element 1 is 0.5"));
        assert!(message("attention_mask", Tensor::new(&[[1f32, 1.]], cpu)).contains("flattened_patches have [1, 3]"));
        Ok(())
    }
}
