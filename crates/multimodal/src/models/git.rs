//! GIT: CLIP's vision tower, whose states stand before the text in one transformer. Pictures see each other, text sees
//! them and the text before it; frames of a video are pictures one after another, each with a learned vector.
//! Source: GIT (arXiv:2205.14100). Mirrors `transformers.GitForCausalLM`.
//!
//! Pictures do not see text. They go through the layers in a pass of their own, which leaves keys and values; of the last
//! layer generation needs nothing else of them.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::config::{self, invalid};
use roofbench_core::cost::{self, AttentionRows, Cost, Norm, PhaseCost};
use roofbench_core::generation::Generation;
use roofbench_core::inputs::{Inputs, in_range, unsupported_method, zero_or_one};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::Pattern;
use roofbench_nn::decoding::Decoding;
use roofbench_nn::embedding::Embedding;
use roofbench_nn::kernels::isa;
use roofbench_nn::layer::EncoderLayer;
use roofbench_nn::linear::Linear;
use roofbench_nn::norm::LayerNorm;
use roofbench_text::causal::{DecoderShape, Pass, at_the_end};
use roofbench_text::models::bert_layer::BertLayerConfig;
use roofbench_text::seq2seq;
use roofbench_vision::models::activation_dtype;
use serde::Deserialize;

use super::vision_tower::{Form, Pixels, VisionTower, VisionTowerConfig};
use super::{behind, forward_phase, named};

/// The classes that run.
pub const CLASSES: &[&str] = &["GitForCausalLM"];

/// Names in published checkpoints. The first is for a tied output matrix.
const RULES: &[AliasRule] = &[
    AliasRule::rename(r"^output\.weight$", "git.embeddings.word_embeddings.weight", AliasScope::Always),
    // integer buffers of the text and of the image encoder
    AliasRule::drop(r"\.position_ids$", AliasScope::Always),
];

/// How published checkpoints name the tensors of `spec`.
pub(crate) fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    let tied = spec.config.get("tie_word_embeddings") == Some(&true.into());
    if tied { RULES } else { &RULES[1..] }
}

/// The part of `config.json` that shapes the computation; field names are the file's own, and what it leaves out is as
/// `transformers.GitConfig` has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct GitConfig {
    /// Distinct tokens.
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
    /// Most tokens of text.
    pub max_position_embeddings: usize,
    /// Added to the variance in every normalisation of the text.
    pub layer_norm_eps: f64,
    /// The output matrix is that of the word embeddings.
    pub tie_word_embeddings: bool,
    /// Most frames of a video; none where absent.
    pub num_image_with_embedding: Option<usize>,
}

impl Default for GitConfig {
    fn default() -> Self {
        Self {
            vocab_size: 30522,
            hidden_size: 768,
            num_hidden_layers: 6,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            max_position_embeddings: 1024,
            layer_norm_eps: 1e-12,
            tie_word_embeddings: false,
            num_image_with_embedding: None,
        }
    }
}

impl GitConfig {
    /// Reads and checks config.json without the tower's part.
    ///
    /// # Errors
    /// Names the field that is malformed, contradicts another, or changes the result in a way that isn't supported.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        config::sizes(&[
            ("vocab_size", cfg.vocab_size),
            ("hidden_size", cfg.hidden_size),
            ("num_hidden_layers", cfg.num_hidden_layers),
            ("num_attention_heads", cfg.num_attention_heads),
            ("intermediate_size", cfg.intermediate_size),
            ("max_position_embeddings", cfg.max_position_embeddings),
        ])?;
        config::multiple(("hidden_size", cfg.hidden_size), ("num_attention_heads", cfg.num_attention_heads))?;
        config::not_negative(&[("layer_norm_eps", cfg.layer_norm_eps)])?;
        config::refuse_unless(spec, "position_embedding_type", &["absolute".into()])?;
        if cfg.num_image_with_embedding.is_some_and(|frames| frames > MOST_FRAMES) {
            return Err(invalid("num_image_with_embedding", format!("is more than {MOST_FRAMES} frames")));
        }
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

    fn shape(&self) -> DecoderShape {
        DecoderShape {
            vocab_size: self.vocab_size,
            layers: self.num_hidden_layers,
            kv_width: self.hidden_size,
            window: None,
            max_positions: Some(self.max_position_embeddings),
        }
    }

    /// FLOPs and bytes of (batch, rows) rows of pictures in the layers; without `states` the last one makes keys and
    /// values alone, in the one product that gives queries too.
    fn look_cost(&self, [batch, rows]: [u64; 2], states: bool, bytes: u64) -> Cost {
        let (layer, layers, hidden) = (self.layer(), self.num_hidden_layers as u64, self.hidden_size as u64);
        let whole = layer.cost(bytes).encoder(AttentionRows::full(batch, rows));
        match states {
            true => whole * layers,
            false => whole * (layers - 1) + cost::linear(batch * rows, hidden, 3 * hidden, true, bytes),
        }
    }

    /// FLOPs and bytes of a pass over tokens, before which `cached` rows are of pictures or of text.
    fn read_cost(&self, pass: Pass, bytes: u64) -> Cost {
        let Pass { batch, seq, cached, logits } = pass;
        let (tokens, hidden) = (batch * seq, self.hidden_size as u64);
        cost::embedding(tokens, hidden, bytes) * 2 // words and positions
            + cost::elementwise(tokens * hidden, 1) // their sum
            + cost::norm(Norm::Layer, tokens, hidden, bytes)
            + self.layer().cost(bytes).encoder(AttentionRows::causal(batch, seq, cached)) * self.num_hidden_layers as u64
            + cost::linear(batch * logits, hidden, self.vocab_size as u64, true, bytes)
    }
}

/// Each has a tensor of its own.
const MOST_FRAMES: usize = 1 << 16;

fn vision_config(spec: &ModelSpec) -> Result<VisionTowerConfig, SessionError> {
    config::nested(spec, "vision_config", |part| {
        // CLIP's own default is 32
        let part = config::with_defaults(part, &[("patch_size", 16.into())]);
        VisionTowerConfig::from_spec(&part, Form::Clip)
    })
}

/// The pictures of a call.
struct Visual {
    /// (batch · frames, channels, height, width)
    values: Tensor,
    /// Frames of each item; a picture is none.
    frames: Option<usize>,
    /// Positions are interpolated to other sizes.
    interpolate: bool,
}

impl Visual {
    /// Those of a call, where it has any: (batch, channels, height, width) or (batch, frames, channels, height, width).
    fn read(
        cfg: &GitConfig,
        vision: &VisionTowerConfig,
        call: &Call,
        inputs: &Inputs,
    ) -> Result<Option<Self>, SessionError> {
        let interpolate = inputs.flag("interpolate_pos_encoding")?;
        let Some(values) = call.inputs.get("pixel_values") else { return Ok(None) };
        let refuse = |reason: String| Err(SessionError::input("pixel_values", reason));
        let (values, frames) = match *values.dims() {
            [batch, frames, channels, height, width] => {
                if channels != vision.num_channels || batch * frames * height * width == 0 || !values.dtype().is_float()
                {
                    return refuse(format!(
                        "is {:?} of shape {:?}, expected floats (batch, frames, channels = {}, height, width), none of \
                         them 0",
                        values.dtype(),
                        values.dims(),
                        vision.num_channels
                    ));
                }
                let most = cfg.num_image_with_embedding.unwrap_or(0);
                if frames > most {
                    return refuse(format!("holds {frames} frames an item, num_image_with_embedding is {most}"));
                }
                (values.reshape((batch * frames, channels, height, width))?, Some(frames))
            }
            _ => (inputs.pictures("pixel_values", vision.num_channels)?.clone(), None),
        };
        let visual = Self { values, frames, interpolate };
        visual.pixels(vision)?;
        Ok(Some(visual))
    }

    fn pixels(&self, vision: &VisionTowerConfig) -> Result<Pixels<'_>, SessionError> {
        Pixels::new(vision, &self.values, self.interpolate)
    }

    /// Items, and rows of each in the decoder.
    fn shape(&self, vision: &VisionTowerConfig) -> Result<[usize; 2], SessionError> {
        let ([pictures, tokens], frames) = (self.pixels(vision)?.shape(), self.frames.unwrap_or(1));
        Ok([pictures as usize / frames, tokens as usize * frames])
    }
}

/// The arguments of a call, checked.
struct Request {
    visual: Option<Visual>,
    /// (batch, seq), i64; a caption begins with the start token, which the call need not say.
    input_ids: Option<Tensor>,
    /// (batch, seq) of 0 and 1.
    attention_mask: Option<Tensor>,
    /// (batch, seq), where the call has its own.
    position_ids: Option<Tensor>,
    /// Sequences.
    batch: usize,
    /// Rows of pictures before each.
    seen: usize,
}

impl Request {
    fn read(cfg: &GitConfig, vision: &VisionTowerConfig, call: &Call) -> Result<Self, SessionError> {
        const INPUTS: [&str; 4] = ["pixel_values", "input_ids", "attention_mask", "position_ids"];
        let inputs = match call.method.as_str() {
            "forward" => Inputs::forward(call, &INPUTS, &["use_cache", "interpolate_pos_encoding"])?,
            "generate" => Inputs::of_any_method(call, &INPUTS[..3])?,
            _ => return Err(unsupported_method(call, "forward, generate")),
        };
        let visual = Visual::read(cfg, vision, call, &inputs)?;
        let [items, seen] = visual.as_ref().map_or(Ok([0, 0]), |visual| visual.shape(vision))?;
        let begins_alone = call.method == "generate" && visual.is_some() && !call.inputs.contains_key("attention_mask");
        if begins_alone && !call.inputs.contains_key("input_ids") {
            return Ok(Self { visual, input_ids: None, attention_mask: None, position_ids: None, batch: items, seen });
        }
        let input_ids = inputs.matrix("input_ids")?;
        in_range("input_ids", &input_ids, "vocab_size", cfg.vocab_size)?;
        let (batch, seq) = input_ids.dims2()?;
        cfg.shape().check_length("input_ids", seq)?;
        if items > 0 && !batch.is_multiple_of(items) {
            let reason = format!("holds {items} items, input_ids hold {batch} sequences, no multiple of them");
            return Err(SessionError::input("pixel_values", reason));
        }
        let attention_mask = inputs.matrix_like("attention_mask", &input_ids)?;
        if let Some(mask) = &attention_mask {
            zero_or_one("attention_mask", mask)?;
        }
        let position_ids = inputs.matrix_like("position_ids", &input_ids)?;
        if let Some(ids) = &position_ids {
            in_range("position_ids", ids, "max_position_embeddings", cfg.max_position_embeddings)?;
        }
        Ok(Self { visual, input_ids: Some(input_ids), attention_mask, position_ids, batch, seen })
    }

    /// How tokens are chosen, and the sequences that they follow.
    fn plan(&self, spec: &ModelSpec, call: &Call) -> Result<(Generation, Vec<Vec<i64>>), SessionError> {
        let length = self.input_ids.as_ref().map_or(Ok(1), |ids| ids.dim(1))?;
        let generation = Generation::read(spec, call, length, &["interpolate_pos_encoding"])?;
        let ids = match &self.input_ids {
            Some(ids) => ids.to_vec2::<i64>()?,
            None => {
                let start = generation.bos_token_id.ok_or_else(|| {
                    SessionError::input("input_ids", "is missing, and nothing says which token is bos_token_id")
                })?;
                vec![vec![start]; self.batch]
            }
        };
        Ok((generation, ids))
    }

    /// The mask of text, with the rows of pictures before it.
    fn with_pictures(&self, mask: &Tensor) -> Result<Tensor> {
        let pictures = Tensor::ones((self.batch, self.seen), DType::I64, mask.device())?;
        Tensor::cat(&[&pictures, mask], 1)
    }
}

/// `GitForCausalLM`.
pub struct GitModel {
    cfg: GitConfig,
    vision: VisionTowerConfig,
    image_encoder: VisionTower,
    img_temporal_embedding: Option<Tensor>, // (1, frames, 1, width of the tower)
    visual_projection: (Linear, LayerNorm),
    word_embeddings: Embedding,
    position_embeddings: Embedding,
    layer_norm: LayerNorm,
    layers: Vec<EncoderLayer>,
    output: Linear,
    spec: ModelSpec,
    bytes: u64,
    paths: BTreeMap<String, String>,
}

impl GitModel {
    /// Loads the model of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// As for [`GitConfig::from_spec`], and when a tensor is missing or has another shape.
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let (cfg, vision, git) = (GitConfig::from_spec(spec)?, vision_config(spec)?, vb.pp("git"));
        let (hidden, eyes, vocab) = (cfg.hidden_size, vision.hidden_size, cfg.vocab_size);
        let embeddings = git.pp("embeddings");
        let (word_embeddings, output) = match cfg.tie_word_embeddings {
            true => {
                let (embedding, output) = Embedding::load_tied(vocab, hidden, embeddings.pp("word_embeddings"))?;
                (embedding, output.with_bias(Some(&vb.get(vocab, "output.bias")?))?)
            }
            false => {
                let embedding = Embedding::load(vocab, hidden, embeddings.pp("word_embeddings"))?;
                (embedding, Linear::load(hidden, vocab, true, vb.pp("output"))?)
            }
        };
        let dtype = activation_dtype(vb.dtype(), vb.device());
        let frame = |i: usize| git.get((1, 1, eyes), &format!("img_temporal_embedding.{i}"))?.to_dtype(dtype);
        let img_temporal_embedding = match cfg.num_image_with_embedding {
            None | Some(0) => None,
            Some(frames) => Some(Tensor::stack(&(0..frames).map(frame).collect::<Result<Vec<_>>>()?, 1)?),
        };
        let projection = git.pp("visual_projection.visual_projection");
        let layer = |i: usize| {
            let vb = git.pp("encoder.layer").pp(i);
            Ok(EncoderLayer {
                attention: cfg.layer().self_attention(Pattern::Causal, "self", false, vb.pp("attention"))?,
                feed_forward: cfg.layer().feed_forward(["intermediate", "output"], vb)?,
            })
        };
        Ok(Self {
            image_encoder: VisionTower::load(&vision, None, git.pp("image_encoder.vision_model"))?,
            img_temporal_embedding,
            visual_projection: (
                Linear::load(eyes, hidden, true, projection.pp(0))?,
                LayerNorm::load(hidden, vision.layer_norm_eps, projection.pp(1))?,
            ),
            word_embeddings,
            position_embeddings: Embedding::load(
                cfg.max_position_embeddings,
                hidden,
                embeddings.pp("position_embeddings"),
            )?,
            layer_norm: LayerNorm::load(hidden, cfg.layer_norm_eps, embeddings.pp("LayerNorm"))?,
            layers: (0..cfg.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            output,
            spec: spec.clone(),
            bytes: vb.dtype().size_in_bytes() as u64,
            paths: isa::paths(&spec.device, spec.dtype),
            cfg,
            vision,
        })
    }

    /// What the layers get of pictures: (batch, rows, hidden).
    fn see(&self, visual: &Visual, batch: usize, observer: &mut dyn Observer) -> Result<Tensor, SessionError> {
        let pixels = visual.pixels(&self.vision)?;
        let x = self.image_encoder.post_layernorm(&self.image_encoder.forward(&pixels)?)?; // (pictures, tokens, width)
        let (pictures, tokens, width) = x.dims3()?;
        let x = match (visual.frames, &self.img_temporal_embedding) {
            (Some(frames), Some(embedding)) => {
                roofbench_nn::cost::elementwise(x.elem_count(), 1);
                let x = x.reshape((pictures / frames, frames, tokens, width))?;
                x.broadcast_add(&embedding.narrow(1, 0, frames)?)?.reshape(((), frames * tokens, width))?
            }
            _ => x,
        };
        observer.end(Phase::Vision);
        let (linear, norm) = &self.visual_projection;
        let x = norm.forward(&linear.forward(&x)?)?; // (items, rows, hidden)
        observer.end(Phase::Projector);
        match batch / x.dim(0)? {
            1 => Ok(x),
            sequences => Ok(x.repeat((sequences, 1, 1))?),
        }
    }

    /// The rows of pictures (batch, rows, hidden) in the layers, which keep their keys and values. Without `states` the
    /// last layer does no more than that.
    fn look(&self, mut x: Tensor, states: bool, decoding: &mut Decoding) -> Result<Tensor> {
        decoding.advance(x.dim(1)?)?;
        for (i, layer) in self.layers.iter().enumerate() {
            if i + 1 == self.layers.len() && !states {
                layer.attention.keep(i, &x, decoding)?;
            } else {
                x = layer.feed_forward.forward(&layer.attention.step_as(Pattern::Full, i, &x, decoding)?)?;
            }
        }
        Ok(x)
    }

    /// Tokens (batch, seq) at their positions in text, in the current pass: (batch, seq, hidden).
    fn read_text(&self, input_ids: &Tensor, position_ids: &Tensor, decoding: &mut Decoding) -> Result<Tensor> {
        let x = self.word_embeddings.forward(input_ids)?;
        roofbench_nn::cost::elementwise(x.elem_count(), 1);
        let x = x.broadcast_add(&self.position_embeddings.forward(position_ids)?)?;
        let x = self.layer_norm.forward(&x)?;
        let mut layers = self.layers.iter().enumerate();
        layers.try_fold(x, |x, (i, layer)| layer.feed_forward.forward(&layer.attention.step(i, &x, decoding)?))
    }

    fn forward(&self, request: &Request, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let Some(input_ids) = &request.input_ids else { return Err(SessionError::input("input_ids", "is missing")) };
        let ((batch, seq), device) = (input_ids.dims2()?, &self.spec.device);
        let position_ids = match &request.position_ids {
            Some(ids) => ids.clone(),
            None => Tensor::arange(0, seq as i64, device)?.unsqueeze(0)?,
        };
        let mask = request.attention_mask.as_ref();
        let Some(visual) = &request.visual else {
            let mut decoding = Decoding::once(batch, seq, mask, device)?;
            let x = self.read_text(input_ids, &position_ids, &mut decoding)?;
            return Ok(named([("logits", self.output.forward(&x)?)]));
        };
        let mut decoding = self.cfg.shape().decoding(batch, request.seen + seq, &self.spec)?;
        let pictures = self.look(self.see(visual, batch, observer)?, true, &mut decoding)?; // (batch, seen, hidden)
        if let Some(mask) = mask {
            decoding = decoding.with_attention_mask(&request.with_pictures(mask)?)?;
        }
        decoding.advance(seq)?;
        let text = self.read_text(input_ids, &position_ids, &mut decoding)?; // (batch, seq, hidden)
        let x = Tensor::cat(&[&pictures, &text], 1)?;
        Ok(named([("logits", self.output.forward(&x)?)]))
    }

    fn generate(&self, call: &Call, request: &Request, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let (generation, ids) = request.plan(&self.spec, call)?;
        let (batch, seq) = (request.batch, ids.first().map_or(0, Vec::len));
        let (shape, positions) = (self.cfg.shape(), generation.positions(seq));
        shape.check_length("max_new_tokens", positions)?;
        let (placed, mask) = at_the_end(&ids, request.attention_mask.as_ref())?;
        let mut decoding = shape.decoding(batch, request.seen + positions, &self.spec)?;
        if let Some(visual) = &request.visual {
            self.look(self.see(visual, batch, observer)?, false, &mut decoding)?;
        }
        if let Some(mask) = mask {
            decoding = decoding.with_attention_mask(&request.with_pictures(&mask)?)?;
        }
        generation.run(&ids, observer, |tokens| {
            let fed = tokens.map_or_else(|| placed.concat(), <[i64]>::to_vec);
            let seq = fed.len() / batch;
            decoding.advance(seq)?;
            // text counts from 0; what does not exist is at 0
            let positions = (decoding.position_ids()?.to_dtype(DType::I64)? - request.seen as f64)?.maximum(0i64)?;
            let x =
                self.read_text(&Tensor::from_vec(fed, (batch, seq), &self.spec.device)?, &positions, &mut decoding)?;
            Ok(self.output.forward(&x.narrow(1, seq - 1, 1)?.contiguous()?.squeeze(1)?)?)
        })
    }

    /// FLOPs and bytes of pictures before the sequences: in the tower, in the projection, and in the layers.
    fn visual_cost(&self, request: &Request, states: bool) -> Result<Option<[Cost; 3]>, SessionError> {
        let Some(visual) = &request.visual else { return Ok(None) };
        let (pixels, bytes) = (visual.pixels(&self.vision)?, self.bytes);
        let rows = pixels.shape().into_iter().product::<u64>();
        let [eyes, hidden] = [self.vision.hidden_size, self.cfg.hidden_size].map(|size| size as u64);
        let moments = if visual.frames.is_some() { cost::elementwise(rows * eyes, 1) } else { Cost::default() };
        let tower =
            self.vision.cost(&pixels, self.vision.num_hidden_layers, None, bytes) + self.vision.norm_cost(rows, bytes);
        let projection = cost::linear(rows, eyes, hidden, true, bytes) + cost::norm(Norm::Layer, rows, hidden, bytes);
        let layers = self.cfg.look_cost([request.batch as u64, request.seen as u64], states, bytes);
        Ok(Some([tower + moments, projection, layers]))
    }
}

/// The cost of a call whose pictures cost `visual` before its text, which gets what they cost in the layers.
fn with_pictures(visual: Option<[Cost; 3]>, text: impl FnOnce(Cost) -> Vec<PhaseCost>) -> Vec<PhaseCost> {
    match visual {
        Some([vision, projector, layers]) => {
            behind([(Phase::Vision, vision), (Phase::Projector, projector)], text(layers))
        }
        None => text(Cost::default()),
    }
}

impl Session for GitModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let request = Request::read(&self.cfg, &self.vision, call)?;
        if call.method == "generate" {
            return self.generate(call, &request, observer);
        }
        let outputs = self.forward(&request, observer)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let request = Request::read(&self.cfg, &self.vision, call)?;
        let [batch, seen] = [request.batch, request.seen].map(|size| size as u64);
        if call.method == "generate" {
            let (generation, ids) = request.plan(&self.spec, call)?;
            let length = ids.first().map_or(0, Vec::len) as u64;
            let pass = |pass: Pass| self.cfg.read_cost(Pass { cached: seen + pass.cached, ..pass }, self.bytes);
            let visual = self.visual_cost(&request, false)?;
            let new = generation.max_new_tokens as u64;
            let text = |layers| seq2seq::generate_cost(pass, layers, [batch, length], new);
            return Ok(with_pictures(visual, text));
        }
        let seq = request.input_ids.as_ref().map_or(Ok(0), |ids| ids.dim(1))? as u64;
        let text = self.cfg.read_cost(Pass { batch, seq, cached: seen, logits: seen + seq }, self.bytes);
        Ok(with_pictures(self.visual_cost(&request, true)?, |layers| forward_phase(layers + text)))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use roofbench_core::session::Unobserved;
    use roofbench_core::weights::{HubOptions, Source, Weights};
    use serde_json::{Value, json};

    use super::*;

    fn tiny() -> Value {
        json!({
            "vocab_size": 10, "hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 6, "max_position_embeddings": 8, "num_image_with_embedding": 2,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            "vision_config": {
                "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 4, "patch_size": 2,
            },
        })
    }

    fn model(config: Value) -> Result<GitModel, SessionError> {
        let spec = ModelSpec::new("git", "GitForCausalLM", config);
        let weights =
            Weights::open(&Source::Synthetic { seed: 0 }, aliases(&spec), &spec.class, &HubOptions::default())?;
        GitModel::load(&spec, weights.var_builder(spec.dtype, &spec.device))
    }

    fn call(method: &str, pixels: &[usize], ids: Option<&[[i64; 3]]>) -> Call {
        let values = Tensor::arange(0f32, pixels.iter().product::<usize>() as f32, &Device::Cpu).expect("pixels");
        let values = (values / 50.0).and_then(|values| values.reshape(pixels)).expect("pixels");
        let mut inputs = Tensors::from([("pixel_values".into(), values)]);
        if let Some(ids) = ids {
            let tokens = Tensor::from_vec(ids.concat(), (ids.len(), 3), &Device::Cpu);
            inputs.insert("input_ids".into(), tokens.expect("ids"));
        }
        Call { method: method.into(), inputs, ..Call::default() }
    }

    #[test]
    fn cost_of_a_tiny_case_by_hand() -> Result<(), SessionError> {
        // two frames of 4 patches and the class token before 3 tokens; tower and layers 4 wide, 6 inside, 2 heads of 2
        let product = |rows: u64, from: u64, to: u64| 2 * rows * from * to + rows * to;
        let (norm, residual) = (|rows: u64| 7 * rows * 4, |rows: u64| rows * 4);
        let feed_forward = |rows: u64| product(rows, 4, 6) + rows * 6 + product(rows, 6, 4) + residual(rows);
        let attention = |pairs: u64| 2 * pairs * (4 * 2 + 5);
        let half =
            |rows: u64, pairs: u64| product(rows, 4, 12) + attention(pairs) + product(rows, 4, 4) + residual(rows);
        let tower = 2 * 8 * 12 * 4 + 8 * 4 // patches of 12 numbers without bias, positions
            + norm(10) // before the layers
            + norm(10) + half(10, 2 * 25) + norm(10) + feed_forward(10)
            + norm(10); // behind them
        let projected = residual(10) + product(10, 4, 4) + norm(10); // moments added
        let layer = |rows, pairs| half(rows, pairs) + norm(rows) + feed_forward(rows) + norm(rows);
        let text = residual(3) + norm(3) + 2 * layer(3, 3 * 10 + 6);
        let mut model = model(tiny())?;
        let mut flops = |call: &Call| {
            let (outputs, recorded) = roofbench_nn::cost::record(|| model.call(call, &mut Unobserved));
            outputs?;
            let formula = model.cost(call)?.iter().map(|phase| phase.cost.flops).sum::<u64>();
            assert_eq!(formula, recorded.flops);
            Ok::<_, SessionError>(formula)
        };
        let forward = call("forward", &[1, 2, 3, 4, 4], Some(&[[1, 5, 7]]));
        assert_eq!(flops(&forward)?, tower + projected + 2 * layer(10, 100) + text + product(13, 4, 10));
        let mut generate = call("generate", &[1, 2, 3, 4, 4], Some(&[[1, 5, 7]]));
        generate.arguments.insert("max_new_tokens".into(), 1.into());
        let kept = product(10, 4, 12);
        assert_eq!(flops(&generate)?, tower + projected + layer(10, 100) + kept + text + product(1, 4, 10));
        Ok(())
    }

    #[test]
    fn pictures_are_shared_by_their_captions() -> Result<(), SessionError> {
        let mut model = model(tiny())?;
        let mut logits = |ids: &[[i64; 3]]| {
            let outputs = model.call(&call("forward", &[1, 3, 4, 4], Some(ids)), &mut Unobserved)?;
            Ok::<_, SessionError>(outputs["logits"].to_vec3::<f32>()?)
        };
        let both = logits(&[[1, 5, 7], [1, 6, 8]])?;
        assert_eq!(both.len(), 2);
        for (alone, shared) in logits(&[[1, 6, 8]])?[0].iter().flatten().zip(both[1].iter().flatten()) {
            assert!((alone - shared).abs() < 1e-5);
        }
        Ok(())
    }

    #[test]
    fn padding_on_either_side_changes_nothing() -> Result<(), SessionError> {
        let mut model = model(tiny())?;
        let mut chosen = |ids: [i64; 3], mask: [i64; 3]| {
            let mut call = call("generate", &[1, 3, 4, 4], Some(&[ids]));
            call.inputs.insert("attention_mask".into(), Tensor::new(&[mask], &Device::Cpu)?);
            call.arguments.insert("max_new_tokens".into(), 3.into());
            call.arguments.insert("output_logits".into(), true.into());
            Ok::<_, SessionError>(model.call(&call, &mut Unobserved)?["logits"].flatten_all()?.to_vec1::<f32>()?)
        };
        let (left, right) = (chosen([0, 1, 5], [0, 1, 1])?, chosen([1, 5, 0], [1, 1, 0])?);
        assert_eq!(left, right);
        Ok(())
    }

    #[test]
    fn a_tied_output_matrix_is_read_once() -> Result<(), SessionError> {
        let mut config = tiny();
        config["tie_word_embeddings"] = true.into();
        let outputs = model(config)?.call(&call("forward", &[1, 3, 4, 4], Some(&[[1, 5, 7]])), &mut Unobserved)?;
        assert_eq!(outputs["logits"].dims(), [1, 5 + 3, 10]);
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_named() -> Result<(), SessionError> {
        for (field, value, start) in [
            ("hidden_size", json!(5), "`hidden_size`: 5 is not a multiple of"),
            ("hidden_act", json!("maxout"), "`hidden_act`: activation `maxout`"),
            ("position_embedding_type", json!("relative"), "`position_embedding_type` = \"relative\" is not supported"),
            ("num_image_with_embedding", json!(1u64 << 40), "`num_image_with_embedding`: is more than"),
            ("vision_config", json!({"patch_size": 0}), "`vision_config.patch_size`: 0 is not in"),
        ] {
            let mut config = tiny();
            config[field] = value;
            let found = model(config).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(found.starts_with(&format!("config.json: {start}")), "{found}");
        }
        let mut model = model(tiny())?;
        let mut message = |method: &str, pixels: &[usize], ids: Option<&[[i64; 3]]>| {
            let outputs = model.call(&call(method, pixels, ids), &mut Unobserved);
            outputs.err().map(|error| error.to_string()).unwrap_or_default()
        };
        let ids: Option<&[[i64; 3]]> = Some(&[[1, 5, 7]]);
        assert_eq!(message("forward", &[1, 1, 3, 4, 4], ids), "");
        assert!(message("forward", &[1, 3, 3, 4, 4], ids).contains("3 frames an item, num_image_with_embedding is 2"));
        assert!(message("forward", &[1, 2, 1, 4, 4], ids).contains("channels = 3"));
        assert!(message("forward", &[2, 3, 4, 4], ids).contains("2 items, input_ids hold 1"));
        assert!(message("forward", &[1, 3, 4, 4], None).contains("`input_ids`: is missing"));
        assert!(message("forward", &[1, 3, 4, 6], ids).contains("interpolate_pos_encoding"));
        assert!(message("generate", &[1, 3, 4, 4], None).contains("comes to 20 positions, the model has 8"));
        Ok(())
    }
}
