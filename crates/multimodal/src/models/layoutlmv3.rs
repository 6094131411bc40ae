//! LayoutLMv3: the words of a page with their places, and patches of the page behind them, in one encoder whose attention
//! is biased by how far apart two rows stand in the text and on the page.
//! Source: LayoutLMv3 (arXiv:2204.08387). Mirrors `transformers.LayoutLMv3Model`, `LayoutLMv3ForTokenClassification`,
//! `LayoutLMv3ForQuestionAnswering` and `LayoutLMv3ForSequenceClassification`.
//!
//! The bias of attention is made once a pass, of numbers of each head by distance, and read by all layers. The library's
//! attention shifts scores before softmax in a way of its own (CogView), which changes nothing but roundings.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::classify::label_count;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, Norm, PhaseCost};
use roofbench_core::inputs::{Inputs, in_range};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::Mask;
use roofbench_nn::kernels::isa;
use roofbench_nn::linear::Linear;
use roofbench_nn::norm::LayerNorm;
use roofbench_nn::patch_embed::PatchEmbed;
use roofbench_nn::relative_bias::{Buckets, RelativeBias, sum_of_biases};
use roofbench_text::models::bert::{self, BertConfig, Encoder, TokenIds};
use roofbench_vision::models::activation_dtype;
use serde::Deserialize;

use super::layoutlm::{BoxEmbeddings, Boxes, CLASSES, answer, two_labels};

/// The part of `config.json` that shapes the computation; field names and defaults are the class's own.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct LayoutLmV3Config {
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
    /// Positions of words, which count from behind `pad_token_id`.
    pub max_position_embeddings: usize,
    /// Distinct segments.
    pub type_vocab_size: usize,
    /// Added to the variance in the encoder's normalisations.
    pub layer_norm_eps: f64,
    /// The word that stands for none; it has the position of its number.
    pub pad_token_id: usize,
    /// Distinct coordinates of boxes, and distinct heights and widths.
    pub max_2d_position_embeddings: usize,
    /// Width of what a coordinate gives; four of them and two of `shape_size` are `hidden_size`.
    pub coordinate_size: usize,
    /// Width of what a height or width gives.
    pub shape_size: usize,
    /// Attention is biased by distance in the text.
    pub has_relative_attention_bias: bool,
    /// Buckets of such distances.
    pub rel_pos_bins: usize,
    /// From this distance on all are in the last.
    pub max_rel_pos: usize,
    /// Attention is biased by distance on the page as well; without the former it is not.
    pub has_spatial_attention_bias: bool,
    /// Buckets of distances on the page.
    pub rel_2d_pos_bins: usize,
    /// From this distance on all are in the last.
    pub max_rel_2d_pos: usize,
    /// There are embeddings of words.
    pub text_embed: bool,
    /// There are embeddings of patches.
    pub visual_embed: bool,
    /// Side of a page.
    pub input_size: usize,
    /// Side of a patch.
    pub patch_size: usize,
    /// Colour channels.
    pub num_channels: usize,
}

impl Default for LayoutLmV3Config {
    fn default() -> Self {
        Self {
            vocab_size: 50265,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            layer_norm_eps: 1e-5,
            pad_token_id: 1,
            max_2d_position_embeddings: 1024,
            coordinate_size: 128,
            shape_size: 128,
            has_relative_attention_bias: true,
            rel_pos_bins: 32,
            max_rel_pos: 128,
            has_spatial_attention_bias: true,
            rel_2d_pos_bins: 64,
            max_rel_2d_pos: 256,
            text_embed: true,
            visual_embed: true,
            input_size: 224,
            patch_size: 16,
            num_channels: 3,
        }
    }
}

/// Added to the variance in the norm of patches, whatever the config says.
const PAGE_EPS: f64 = 1e-6;
/// The largest height or width that is looked up.
const LARGEST_BOX: i64 = 1023;
/// The side of a page in the coordinates of boxes.
const PAGE: usize = 1000;
/// From so many labels on, a word's head has two layers.
const MANY_LABELS: usize = 10;

impl LayoutLmV3Config {
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
            ("num_attention_heads", cfg.num_attention_heads),
            ("intermediate_size", cfg.intermediate_size),
            ("max_position_embeddings", cfg.max_position_embeddings),
            ("type_vocab_size", cfg.type_vocab_size),
            ("max_2d_position_embeddings", cfg.max_2d_position_embeddings),
            ("coordinate_size", cfg.coordinate_size),
            ("shape_size", cfg.shape_size),
            ("rel_pos_bins", cfg.rel_pos_bins),
            ("max_rel_pos", cfg.max_rel_pos),
            ("rel_2d_pos_bins", cfg.rel_2d_pos_bins),
            ("max_rel_2d_pos", cfg.max_rel_2d_pos),
            ("input_size", cfg.input_size),
            ("patch_size", cfg.patch_size),
            ("num_channels", cfg.num_channels),
        ])?;
        config::multiple(("hidden_size", cfg.hidden_size), ("num_attention_heads", cfg.num_attention_heads))?;
        config::not_negative(&[("layer_norm_eps", cfg.layer_norm_eps)])?;
        let places = 4 * cfg.coordinate_size + 2 * cfg.shape_size;
        if places != cfg.hidden_size {
            let reason = format!("{} is not 4 coordinate_size + 2 shape_size = {places}", cfg.hidden_size);
            return Err(config::invalid("hidden_size", reason));
        }
        if cfg.side() == 0 {
            return Err(config::invalid("patch_size", "is larger than input_size"));
        }
        Ok(cfg)
    }

    /// Patches along a side of the page.
    fn side(&self) -> usize {
        self.input_size / self.patch_size
    }

    /// Rows of a page in the sequence: a token and the patches.
    fn page_rows(&self) -> usize {
        1 + self.side() * self.side()
    }

    fn bert(&self) -> BertConfig {
        BertConfig {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            intermediate_size: self.intermediate_size,
            max_position_embeddings: self.max_position_embeddings,
            type_vocab_size: self.type_vocab_size,
            hidden_act: self.hidden_act,
            layer_norm_eps: self.layer_norm_eps,
            tie_word_embeddings: false,
        }
    }

    /// Terms of attention's bias: of the text, and of both directions on the page.
    fn bias_terms(&self) -> usize {
        match (self.has_relative_attention_bias, self.has_spatial_attention_bias) {
            (false, _) => 0,
            (true, false) => 1,
            (true, true) => 3,
        }
    }
}

/// Words with their segments, positions and places.
struct TextEmbeddings {
    words: bert::Embeddings,
    places: BoxEmbeddings,
}

/// Patches of a page behind a token, with their positions, and the norm of the whole sequence.
struct PageEmbeddings {
    patch_embed: PatchEmbed,
    cls_token: Tensor, // (1, 1, hidden)
    pos_embed: Tensor, // (1, 1 + patches, hidden)
    norm: LayerNorm,
    sequence_norm: LayerNorm,
}

impl PageEmbeddings {
    fn load(cfg: &LayoutLmV3Config, vb: VarBuilder) -> Result<Self> {
        let (hidden, patch) = (cfg.hidden_size, (cfg.patch_size, cfg.patch_size));
        let dtype = activation_dtype(vb.dtype(), vb.device());
        let get = |rows: usize, name: &str| vb.get((1, rows, hidden), name)?.to_dtype(dtype);
        Ok(Self {
            patch_embed: PatchEmbed::load(cfg.num_channels, hidden, patch, true, vb.pp("patch_embed.proj"))?,
            cls_token: get(1, "cls_token")?,
            pos_embed: get(cfg.page_rows(), "pos_embed")?,
            norm: LayerNorm::load(hidden, PAGE_EPS, vb.pp("norm"))?,
            sequence_norm: LayerNorm::load(hidden, cfg.layer_norm_eps, vb.pp("LayerNorm"))?,
        })
    }

    /// (batch, channels, height, width) -> (batch, 1 + patches, hidden).
    fn forward(&self, pixel_values: &Tensor) -> Result<Tensor> {
        let patches = self.patch_embed.forward(pixel_values)?;
        let (batch, _, hidden) = patches.dims3()?;
        let x = Tensor::cat(&[&self.cls_token.broadcast_as((batch, 1, hidden))?, &patches], 1)?;
        roofbench_nn::cost::elementwise(x.elem_count(), 1); // positions added
        self.norm.forward(&x.broadcast_add(&self.pos_embed)?)
    }
}

/// What attention's bias is made of.
struct Biases {
    text: Option<RelativeBias>,
    /// By left and by lower edges.
    page: Option<[RelativeBias; 2]>,
    scale: f32,
}

impl Biases {
    fn load(cfg: &LayoutLmV3Config, vb: VarBuilder) -> Result<Self> {
        let heads = cfg.num_attention_heads;
        let bias = |name: &str, count: usize, max_distance: usize| {
            let table = vb.get((heads, count), &format!("{name}.weight"))?.t()?;
            RelativeBias::new(&table, Buckets { count, max_distance, bidirectional: true })
        };
        let spatial = |name: &str| bias(name, cfg.rel_2d_pos_bins, cfg.max_rel_2d_pos);
        Ok(Self {
            text: match cfg.has_relative_attention_bias {
                true => Some(bias("rel_pos_bias", cfg.rel_pos_bins, cfg.max_rel_pos)?),
                false => None,
            },
            page: match cfg.has_spatial_attention_bias {
                true => Some([spatial("rel_pos_x_bias")?, spatial("rel_pos_y_bias")?]),
                false => None,
            },
            scale: (cfg.hidden_size as f32 / heads as f32).sqrt().recip(),
        })
    }

    /// Of every pair of rows (batch, heads, seq, seq), where there is a bias.
    fn forward(&self, cfg: &LayoutLmV3Config, inputs: &Page) -> Result<Option<Tensor>> {
        let Some(text) = &self.text else { return Ok(None) };
        let words = inputs.words()?;
        let page = if inputs.pixel_values.is_some() { cfg.page_rows() } else { 0 };
        // words count from 0, and so do the rows of the page
        let positions = vec![(0..words as i64).chain(0..page as i64).collect::<Vec<_>>(); inputs.batch];
        let mut terms = vec![(text, &*positions)];
        let places: [Vec<Vec<i64>>; 2];
        if let Some([x, y]) = &self.page {
            let side = cfg.side();
            let edge = |i: usize| (i * PAGE / side) as i64;
            // the left edges and the lower ones; the token's box is nearly the page
            let patches = [
                std::iter::once(1).chain((0..side * side).map(|patch| edge(patch % side))).collect::<Vec<_>>(),
                std::iter::once(PAGE as i64 - 1).chain((0..side * side).map(|patch| edge(patch / side + 1))).collect(),
            ];
            let of = |edge: usize, patches: &[i64]| -> Result<Vec<Vec<i64>>> {
                let mut rows = match &inputs.text {
                    Some((_, boxes)) => boxes.edges[edge].to_vec2::<i64>()?,
                    None => vec![Vec::new(); inputs.batch],
                };
                rows.iter_mut().for_each(|row| row.extend(&patches[..page]));
                Ok(rows)
            };
            places = [of(0, &patches[0])?, of(3, &patches[1])?];
            terms.extend([(x, &*places[0]), (y, &*places[1])]);
        }
        sum_of_biases(&terms, self.scale).map(Some)
    }
}

/// What follows the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HeadKind {
    None,
    /// Labels of every word.
    Words {
        labels: usize,
    },
    /// Start and end of an answer, among all rows.
    Answer,
    /// Labels of the page.
    Page {
        labels: usize,
    },
}

impl HeadKind {
    fn of(spec: &ModelSpec) -> Result<Self, SessionError> {
        match spec.class.as_str() {
            "LayoutLMv3Model" => Ok(Self::None),
            "LayoutLMv3ForTokenClassification" => Ok(Self::Words { labels: label_count(&spec.config)? }),
            "LayoutLMv3ForQuestionAnswering" => two_labels(spec).map(|_| Self::Answer),
            "LayoutLMv3ForSequenceClassification" => Ok(Self::Page { labels: label_count(&spec.config)? }),
            _ => Err(config::unsupported_class(spec, CLASSES)),
        }
    }

    /// The first rows of the last layer that it reads, when that is not all.
    fn rows(self, words: usize) -> Option<usize> {
        match self {
            Self::None | Self::Answer => None,
            Self::Words { .. } => Some(words),
            Self::Page { .. } => Some(1),
        }
    }
}

/// The layers of a [`HeadKind`].
struct Head {
    /// With tanh.
    dense: Option<Linear>,
    output: Linear,
}

impl Head {
    fn load(kind: HeadKind, hidden: usize, vb: VarBuilder) -> Result<Option<Self>> {
        let (vb, labels) = match kind {
            HeadKind::None => return Ok(None),
            HeadKind::Words { labels } | HeadKind::Page { labels } => (vb.pp("classifier"), labels),
            HeadKind::Answer => (vb.pp("qa_outputs"), 2),
        };
        Ok(Some(match kind {
            HeadKind::Words { labels } if labels < MANY_LABELS => {
                Self { dense: None, output: Linear::load(hidden, labels, true, vb)? }
            }
            _ => Self {
                dense: Some(Linear::load(hidden, hidden, true, vb.pp("dense"))?),
                output: Linear::load(hidden, labels, true, vb.pp("out_proj"))?,
            },
        }))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.dense {
            Some(dense) => self.output.forward(&dense.forward_act(x, Activation::Tanh)?),
            None => self.output.forward(x),
        }
    }
}

/// The encoder with the head of its class.
pub struct LayoutLmV3Model {
    cfg: LayoutLmV3Config,
    text: Option<TextEmbeddings>,
    page: Option<PageEmbeddings>,
    biases: Biases,
    encoder: Encoder,
    head: Option<Head>,
    kind: HeadKind,
    dtype: DType,
    device: Device,
    paths: BTreeMap<String, String>,
}

impl LayoutLmV3Model {
    /// Loads the class of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// Names the config field or the tensor at fault, or the class when it is none of [`CLASSES`].
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let (kind, cfg) = (HeadKind::of(spec)?, LayoutLmV3Config::from_spec(spec)?);
        let layoutlm = if kind == HeadKind::None { vb.clone() } else { vb.pp("layoutlmv3") };
        let text = || {
            let (rows, vb) = (cfg.max_2d_position_embeddings, layoutlm.pp("embeddings"));
            Ok::<_, candle_core::Error>(TextEmbeddings {
                words: bert::Embeddings::load(&cfg.bert(), vb.clone())?,
                places: BoxEmbeddings::load(rows, cfg.coordinate_size, cfg.shape_size, vb)?,
            })
        };
        let page = || PageEmbeddings::load(&cfg, layoutlm.clone());
        Ok(Self {
            text: if cfg.text_embed { Some(text()?) } else { None },
            page: if cfg.visual_embed { Some(page()?) } else { None },
            biases: Biases::load(&cfg, layoutlm.pp("encoder"))?,
            encoder: Encoder::load(&cfg.bert(), kind.rows(1).is_some(), layoutlm.pp("encoder"))?,
            head: Head::load(kind, cfg.hidden_size, vb)?,
            kind,
            dtype: spec.dtype,
            device: spec.device.clone(),
            paths: isa::paths(&spec.device, spec.dtype),
            cfg,
        })
    }

    fn forward(&self, inputs: &Page) -> Result<Tensors> {
        let text = match (&self.text, &inputs.text) {
            (Some(embeddings), Some((ids, boxes))) => {
                let places = Tensor::cat(&embeddings.places.forward(boxes)?, 2)?; // (batch, words, hidden)
                Some(embeddings.words.forward_add(ids, &places)?)
            }
            _ => None,
        };
        let page = match (&self.page, inputs.pixel_values) {
            (Some(embeddings), Some(values)) => {
                let dtype = activation_dtype(self.dtype, &self.device);
                Some((embeddings, embeddings.forward(&values.to_device(&self.device)?.to_dtype(dtype)?)?))
            }
            _ => None,
        };
        let x = match (text, page) {
            (Some(text), None) => text,
            (text, Some((embeddings, page))) => {
                let parts: Vec<&Tensor> = text.iter().chain([&page]).collect();
                embeddings.sequence_norm.forward(&Tensor::cat(&parts, 1)?)?
            }
            (None, None) => candle_core::bail!("LayoutLMv3: neither words nor a page"), // refused when read
        };
        let bias = self.biases.forward(&self.cfg, inputs)?;
        let x =
            self.encoder.forward(x, &self.kind.rows(inputs.words()?).into(), inputs.mask(&self.cfg, bias)?.as_ref())?;
        let Some(head) = &self.head else { return Ok(Tensors::from([("last_hidden_state".into(), x)])) };
        Ok(match self.kind {
            HeadKind::Answer => answer(&head.forward(&x)?)?,
            HeadKind::Page { .. } => Tensors::from([("logits".into(), head.forward(&x)?.squeeze(1)?)]),
            HeadKind::Words { .. } | HeadKind::None => Tensors::from([("logits".into(), head.forward(&x)?)]),
        })
    }
}

/// The arguments of `forward`, checked.
struct Page<'a> {
    batch: usize,
    text: Option<(TokenIds, Boxes)>,
    /// (batch, channels, height, width)
    pixel_values: Option<&'a Tensor>,
}

impl<'a> Page<'a> {
    fn read(cfg: &LayoutLmV3Config, kind: HeadKind, call: &'a Call) -> Result<Self, SessionError> {
        let known = ["input_ids", "bbox", "attention_mask", "token_type_ids", "position_ids", "pixel_values"];
        let inputs = Inputs::forward(call, &known, &[])?;
        let needed = matches!(kind, HeadKind::Words { .. }) || !inputs.has("pixel_values");
        let text = match inputs.has("input_ids") || needed {
            false => None,
            true if !cfg.text_embed => {
                return Err(SessionError::input("input_ids", "text_embed is false in config.json"));
            }
            true => {
                let mut ids = TokenIds::of(&cfg.bert(), &inputs, "input_ids")?;
                if !inputs.has("position_ids") {
                    ids.position_ids = positions_behind(&ids.input_ids, cfg.pad_token_id)?;
                    in_range(
                        "input_ids (their positions)",
                        &ids.position_ids,
                        "max_position_embeddings",
                        cfg.max_position_embeddings,
                    )?;
                }
                let boxes = Boxes::read(&inputs, &ids.input_ids, cfg.max_2d_position_embeddings, Some(LARGEST_BOX))?;
                Some((ids, boxes))
            }
        };
        if text.is_none()
            && let Some(name) =
                ["bbox", "attention_mask", "token_type_ids", "position_ids"].iter().find(|name| inputs.has(name))
        {
            return Err(SessionError::input(name, "needs input_ids"));
        }
        let pixel_values = match inputs.has("pixel_values") {
            false => None,
            true if !cfg.visual_embed => {
                return Err(SessionError::input("pixel_values", "visual_embed is false in config.json"));
            }
            true => Some(inputs.pictures("pixel_values", cfg.num_channels)?),
        };
        if let Some(values) = pixel_values {
            let (batch, _, height, width) = values.dims4()?;
            let patches = (height / cfg.patch_size) * (width / cfg.patch_size);
            if patches + 1 != cfg.page_rows() {
                let (side, learned) = (cfg.input_size, cfg.page_rows() - 1);
                let reason = format!(
                    "is {height} x {width} pixels, {patches} patches; input_size is {side} x {side}, {learned}; resize them"
                );
                return Err(SessionError::input("pixel_values", reason));
            }
            if let Some((ids, _)) = &text
                && ids.input_ids.dim(0)? != batch
            {
                let reason = format!("holds {batch} pages, input_ids {} texts", ids.input_ids.dim(0)?);
                return Err(SessionError::input("pixel_values", reason));
            }
        }
        let batch = match (&text, pixel_values) {
            (Some((ids, _)), _) => ids.input_ids.dim(0)?,
            (None, Some(values)) => values.dim(0)?,
            (None, None) => 0, // not reached: text is needed then
        };
        Ok(Self { batch, text, pixel_values })
    }

    fn words(&self) -> Result<usize> {
        self.text.as_ref().map_or(Ok(0), |(ids, _)| ids.input_ids.dim(1))
    }

    /// Which words exist, and the bias.
    fn mask(&self, cfg: &LayoutLmV3Config, bias: Option<Tensor>) -> Result<Option<Mask>> {
        let biased = bias.as_ref().map(Mask::additive).transpose()?;
        let Some(words) = self.text.as_ref().and_then(|(ids, _)| ids.attention_mask.as_ref()) else {
            return Ok(biased);
        };
        let all = match self.pixel_values {
            Some(_) => {
                let page = Tensor::ones((self.batch, cfg.page_rows()), words.dtype(), words.device())?;
                &Tensor::cat(&[words, &page], 1)?
            }
            None => words,
        };
        match biased {
            Some(mask) => mask.with_padding(all).map(Some),
            None => Mask::padding(all),
        }
    }
}

/// Words count from behind the number of padding, which itself stays there.
fn positions_behind(ids: &Tensor, padding: usize) -> Result<Tensor> {
    let padding = padding as i64;
    let mut positions = Vec::with_capacity(ids.elem_count());
    for row in ids.to_vec2::<i64>()? {
        let mut last = padding;
        positions.extend(row.into_iter().map(|id| {
            if id == padding {
                return padding;
            }
            last += 1;
            last
        }));
    }
    Tensor::from_vec(positions, ids.dims(), ids.device())
}

impl Session for LayoutLmV3Model {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let outputs = self.forward(&Page::read(&self.cfg, self.kind, call)?)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let page = Page::read(&self.cfg, self.kind, call)?;
        let size = page.pixel_values.map(|values| values.dims4()).transpose()?;
        let shape = [page.batch, page.words()?];
        let bytes = self.dtype.size_in_bytes() as u64;
        let cost = forward_cost(&self.cfg, self.kind, shape, size.map(|(.., h, w)| [h, w]), bytes);
        Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }])
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// FLOPs and bytes of one forward pass over (batch, words) and, where there is one, a page of height and width.
fn forward_cost(
    cfg: &LayoutLmV3Config,
    kind: HeadKind,
    [batch, words]: [usize; 2],
    page: Option<[usize; 2]>,
    bytes: u64,
) -> Cost {
    let (hidden, bert) = (cfg.hidden_size as u64, cfg.bert());
    let tokens = (batch * words) as u64;
    let norm = |rows: usize| cost::norm(Norm::Layer, (batch * rows) as u64, hidden, bytes);
    let text = match words {
        0 => Cost::default(),
        // places looked up and added
        _ => {
            bert::Embeddings::cost(&bert, [batch, words], bytes)
                + cost::embedding(tokens, hidden, bytes)
                + cost::elementwise(tokens * hidden, 1)
        }
    };
    let rows = cfg.page_rows();
    let seq = words + page.map_or(0, |_| rows);
    let page = page.map_or(Cost::default(), |[height, width]| {
        let patches = cost::Conv2d {
            batch: batch as u64,
            in_channels: cfg.num_channels as u64,
            out_channels: hidden,
            kernel: [cfg.patch_size as u64; 2],
            groups: 1,
            output: [height, width].map(|n| (n / cfg.patch_size) as u64),
            bias: true,
        };
        cost::input((batch * cfg.num_channels * height * width) as u64, bytes)
            + patches.cost(bytes)
            + Cost { weight_bytes: (1 + rows as u64) * hidden * bytes, ..Cost::default() }
            + cost::elementwise((batch * rows) as u64 * hidden, 1) // positions added
            + norm(rows)
            + norm(seq)
    });
    let pairs = (batch * cfg.num_attention_heads * seq * seq) as u64;
    let bias = cost::elementwise(pairs, cfg.bias_terms() as u64);
    let read = batch * kind.rows(words).unwrap_or(seq);
    let linear = |output: usize| cost::linear(read as u64, hidden, output as u64, true, bytes);
    let two = |labels: usize| linear(cfg.hidden_size) + cost::elementwise(read as u64 * hidden, 1) + linear(labels);
    let head = match kind {
        HeadKind::None => Cost::default(),
        HeadKind::Words { labels } if labels < MANY_LABELS => linear(labels),
        HeadKind::Words { labels } | HeadKind::Page { labels } => two(labels),
        HeadKind::Answer => two(2),
    };
    text + page + bias + Encoder::cost(&bert, [batch, seq], kind.rows(words).unwrap_or(seq), bytes) + head
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(class: &str, changes: Value) -> ModelSpec {
        let mut config = json!({
            "vocab_size": 10, "hidden_size": 6, "coordinate_size": 1, "shape_size": 1, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 5, "max_position_embeddings": 8, "type_vocab_size": 1,
            "input_size": 4, "patch_size": 2, "num_channels": 1,
        });
        for (field, value) in changes.as_object().expect("an object") {
            config[field] = value.clone();
        }
        ModelSpec::new("layoutlm", class, config)
    }

    fn message(class: &str, changes: Value, inputs: &[(&str, &Tensor)]) -> String {
        let spec = spec(class, changes);
        let inputs = inputs.iter().map(|(name, tensor)| ((*name).to_owned(), (*tensor).clone())).collect();
        let call = Call { method: "forward".into(), inputs, ..Call::default() };
        let read = HeadKind::of(&spec)
            .and_then(|kind| Page::read(&LayoutLmV3Config::from_spec(&spec)?, kind, &call).map(drop));
        read.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let zeros = |shape: &[usize], dtype: DType| Tensor::zeros(shape, dtype, &Device::Cpu).expect("zeros");
        let (ids, page) = (zeros(&[1, 6], DType::I64), zeros(&[1, 1, 4, 4], DType::F32));
        let (words, model) = ("LayoutLMv3ForTokenClassification", "LayoutLMv3Model");
        assert_eq!(message(model, json!({}), &[("input_ids", &ids), ("pixel_values", &page)]), "");
        assert_eq!(message(model, json!({}), &[("pixel_values", &page)]), "");
        assert_eq!(message(words, json!({}), &[("pixel_values", &page)]), "input `input_ids`: is missing");
        for (changes, start) in [
            (json!({"shape_size": 2}), "config.json: `hidden_size`: 6 is not 4 coordinate_size + 2 shape_size = 8"),
            (json!({"patch_size": 5}), "config.json: `patch_size`: is larger than input_size"),
            (json!({"patch_size": [2, 2]}), "config.json: `patch_size`: "),
            (json!({"text_embed": false}), "input `input_ids`: text_embed is false"),
        ] {
            let found = message(model, changes, &[("input_ids", &ids)]);
            assert!(found.starts_with(start), "{found}");
        }
        // six words behind the number of padding, 1, reach 7; a seventh would need a table of 9
        let seven = zeros(&[1, 7], DType::I64);
        let error = message(model, json!({}), &[("input_ids", &seven)]);
        assert!(error.starts_with("input `input_ids (their positions)`: element 6 is 8"), "{error}");
        let error = message(model, json!({}), &[("pixel_values", &page), ("bbox", &zeros(&[1, 6, 4], DType::I64))]);
        assert_eq!(error, "input `bbox`: needs input_ids");
        let wide = zeros(&[1, 1, 4, 6], DType::F32);
        assert!(message(model, json!({}), &[("pixel_values", &wide)]).contains("4 x 6 pixels, 6 patches"));
        let error = message("LayoutLMv3ForQuestionAnswering", json!({"num_labels": 4}), &[("input_ids", &ids)]);
        assert!(error.contains("`num_labels`: 4 is not 2"), "{error}");
    }

    #[test]
    fn positions_count_from_behind_padding() -> Result<()> {
        let ids = Tensor::new(&[[5i64, 1, 7, 8], [1, 1, 2, 1]], &Device::Cpu)?;
        assert_eq!(positions_behind(&ids, 1)?.to_vec2::<i64>()?, [[2, 1, 3, 4], [1, 1, 2, 1]]);
        Ok(())
    }

    /// 3 words and 4 patches behind a token: 8 rows of width 6, inner width 5, 2 heads of 3.
    #[test]
    fn cost_by_hand() {
        let cfg = LayoutLmV3Config::from_spec(&spec("LayoutLMv3Model", json!({}))).expect("a config");
        let text = (2 + 7 + 1) * 3 * 6; // two additions and the norm, places added
        let page = 2 * (4 * 6) * 4 + 4 * 6 + (1 + 7) * 5 * 6 + 7 * 8 * 6; // patches, positions, norm, norm of all
        let bias = 3 * 2 * 64;
        let layer = 2 * 8 * 6 * 18
            + 8 * 18
            + 4 * (2 * 64) * 3
            + 5 * 2 * 64
            + 2 * 8 * 6 * 6
            + 8 * 6
            + 48
            + 7 * 48
            + 2 * 8 * 6 * 5
            + 8 * 5
            + 40
            + 2 * 8 * 5 * 6
            + 8 * 6
            + 48
            + 7 * 48;
        let flops = |kind| forward_cost(&cfg, kind, [1, 3], Some([4, 4]), 4).flops;
        assert_eq!(flops(HeadKind::None), text + page + bias + layer);
        assert_eq!(flops(HeadKind::Answer) - flops(HeadKind::None), 8 * (2 * 36 + 6 + 6 + 2 * 6 * 2 + 2));
    }
}
