//! ViLT: words and patches of a picture in one sequence, through the layers of a Vision Transformer.
//! Source: ViLT (arXiv:2102.03334). Mirrors `transformers.ViltModel`, `ViltForMaskedLM`, `ViltForQuestionAnswering`,
//! `ViltForImageAndTextRetrieval`, `ViltForImagesAndTextClassification` and `ViltForTokenClassification`.
//!
//! Pictures of a batch that are padded to one size lose their padding again: of each picture the patches that its mask
//! keeps are taken row by row, and then, up to the most that one has, patches of its padding, which nothing attends to.
//! The library draws the same patches in random order, which changes nothing but the order of the rows.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::classify::label_count;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, Norm, PhaseCost};
use roofbench_core::inputs::{Inputs, zero_or_one};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::Mask;
use roofbench_nn::gather::{RowIndex, gather};
use roofbench_nn::kernels::isa;
use roofbench_nn::linear::Linear;
use roofbench_nn::norm::LayerNorm;
use roofbench_nn::patch_embed::PatchEmbed;
use roofbench_nn::resize;
use roofbench_text::models::bert::{self, BertConfig, Pooler, PredictionHead, TokenIds};
use roofbench_vision::models::activation_dtype;
use roofbench_vision::models::vit::{Encoder, EncoderConfig};
use serde::Deserialize;
use serde_json::Value;

/// The classes that run.
pub const CLASSES: &[&str] = &[
    "ViltModel",
    "ViltForMaskedLM",
    "ViltForQuestionAnswering",
    "ViltForImageAndTextRetrieval",
    "ViltForImagesAndTextClassification",
    "ViltForTokenClassification",
];

/// Names in published checkpoints. The first is for a tied output matrix.
const RULES: &[AliasRule] = &[
    AliasRule::rename(
        r"^mlm_score\.decoder\.weight$",
        "vilt.embeddings.text_embeddings.word_embeddings.weight",
        AliasScope::Head,
    ),
    // an integer buffer
    AliasRule::drop(r"\.position_ids$", AliasScope::Always),
    // older files hold this bias under one of two names, or both
    AliasRule::rename(r"^mlm_score\.bias$", "mlm_score.decoder.bias", AliasScope::Always),
    // saved from a class with a head, and from ViltModel
    AliasRule::drop(r"^(mlm_score|classifier|rank_output)\.", AliasScope::Base),
    AliasRule::rename(r"^vilt\.", "", AliasScope::Base),
    AliasRule::rename(r"^(embeddings|encoder|layernorm|pooler)\.", "vilt.$1.", AliasScope::Head),
    AliasRule::drop(r"^vilt\.pooler\.", AliasScope::Class("ViltForTokenClassification")),
];

/// How published checkpoints name the tensors of `spec`.
pub fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    let untied = spec.config.get("tie_word_embeddings") == Some(&Value::Bool(false));
    if spec.class == "ViltForMaskedLM" && !untied { RULES } else { &RULES[1..] }
}

/// The part of `config.json` that shapes the computation; field names and defaults are the class's own.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct ViltConfig {
    /// Distinct words.
    pub vocab_size: usize,
    /// Distinct segments of the text.
    pub type_vocab_size: usize,
    /// Text, and pictures by their place in a call.
    pub modality_type_vocab_size: usize,
    /// Longest text.
    pub max_position_embeddings: usize,
    /// Width of the stream.
    pub hidden_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads; they divide `hidden_size`.
    pub num_attention_heads: usize,
    /// Width inside the feed-forward half.
    pub intermediate_size: usize,
    /// Activation of the feed-forward half and of the masked-LM head.
    pub hidden_act: Activation,
    /// Added to the variance in the encoder's normalisations.
    pub layer_norm_eps: f64,
    /// Side of the pictures that the positions were learned on.
    pub image_size: usize,
    /// Side of a patch.
    pub patch_size: usize,
    /// Colour channels.
    pub num_channels: usize,
    /// The products of query, key and value have biases.
    pub qkv_bias: bool,
    /// At most so many patches of a picture are taken; all where it is negative.
    pub max_image_length: i64,
    /// The masked-LM head multiplies with the word embeddings.
    pub tie_word_embeddings: bool,
    /// Pictures in a call of `ViltForImagesAndTextClassification`.
    pub num_images: i64,
}

impl Default for ViltConfig {
    fn default() -> Self {
        Self {
            vocab_size: 30522,
            type_vocab_size: 2,
            modality_type_vocab_size: 2,
            max_position_embeddings: 40,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-12,
            image_size: 384,
            patch_size: 32,
            num_channels: 3,
            qkv_bias: true,
            max_image_length: -1,
            tie_word_embeddings: true,
            num_images: -1,
        }
    }
}

impl ViltConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is malformed or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        let sizes = [
            ("vocab_size", cfg.vocab_size),
            ("type_vocab_size", cfg.type_vocab_size),
            ("modality_type_vocab_size", cfg.modality_type_vocab_size),
            ("max_position_embeddings", cfg.max_position_embeddings),
            ("hidden_size", cfg.hidden_size),
            ("num_hidden_layers", cfg.num_hidden_layers),
            ("num_attention_heads", cfg.num_attention_heads),
            ("intermediate_size", cfg.intermediate_size),
            ("image_size", cfg.image_size),
            ("patch_size", cfg.patch_size),
            ("num_channels", cfg.num_channels),
        ];
        config::sizes(&sizes)?;
        config::multiple(("hidden_size", cfg.hidden_size), ("num_attention_heads", cfg.num_attention_heads))?;
        config::not_negative(&[("layer_norm_eps", cfg.layer_norm_eps)])?;
        if cfg.side() == 0 {
            return Err(config::invalid("patch_size", "is larger than image_size"));
        }
        if cfg.max_image_length == 0 {
            return Err(config::invalid("max_image_length", "0 leaves no patch"));
        }
        Ok(cfg)
    }

    /// Patches along a side of the pictures that the positions were learned on.
    fn side(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// The text's embeddings and the masked-LM head.
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
            tie_word_embeddings: self.tie_word_embeddings,
        }
    }

    fn encoder(&self) -> EncoderConfig {
        EncoderConfig {
            hidden_size: self.hidden_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            intermediate_size: self.intermediate_size,
            qkv_bias: self.qkv_bias,
            hidden_act: self.hidden_act,
            layer_norm_eps: self.layer_norm_eps,
        }
    }
}

/// Patches of pictures and a class token, with their positions and the modality.
struct VisualEmbeddings {
    /// Class token and its position (1, hidden).
    class: Tensor,
    /// Learned positions (1, hidden, side, side).
    positions: Tensor,
    /// (modalities, hidden), the text's first.
    types: Tensor,
    patch_embeddings: PatchEmbed,
    side: usize,
}

impl VisualEmbeddings {
    fn load(cfg: &ViltConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, side) = (cfg.hidden_size, cfg.side());
        let dtype = activation_dtype(vb.dtype(), vb.device());
        let position_embeddings = vb.get((1, 1 + side * side, hidden), "position_embeddings")?.to_dtype(dtype)?;
        let class = vb.get((1, 1, hidden), "cls_token")?.to_dtype(dtype)?;
        let grid = position_embeddings.narrow(1, 1, side * side)?.transpose(1, 2)?.contiguous()?;
        let types = vb.get((cfg.modality_type_vocab_size, hidden), "token_type_embeddings.weight")?;
        let patch = (cfg.patch_size, cfg.patch_size);
        let projection = vb.pp("patch_embeddings.projection");
        Ok(Self {
            class: (class + position_embeddings.narrow(1, 0, 1)?)?.squeeze(0)?,
            positions: grid.reshape((1, hidden, side, side))?,
            types: types.to_dtype(dtype)?,
            patch_embeddings: PatchEmbed::load(cfg.num_channels, hidden, patch, true, projection)?,
            side,
        })
    }

    /// (items, channels, height, width) -> the class token's rows (items, 1, hidden) and those of the patches that are
    /// taken (items, length, hidden).
    fn forward(&self, pixel_values: &Tensor, patches: &Patches) -> Result<[Tensor; 2]> {
        let items = patches.sizes.len();
        let mut x = self.patch_embeddings.forward(pixel_values)?; // (items, patches, hidden)
        let all = patches.grid[0] * patches.grid[1];
        if !patches.are_all() {
            let rows = patches
                .taken
                .iter()
                .enumerate()
                .flat_map(|(item, taken)| taken.iter().map(move |row| item * all + row));
            x = gather(&x, &RowIndex::new(items * all, (items, patches.length), rows.map(Some))?)?;
        }
        // for each kind of picture the class token's row, that of padding, and those of its patches
        let kinds = patches.kinds();
        let blocks = kinds.iter().map(|kind| self.block(*kind)).collect::<Result<Vec<_>>>()?;
        let table = Tensor::cat(&blocks, 0)?;
        let begins: Vec<usize> = (0..kinds.len()).map(|k| kinds[..k].iter().map(|kind| kind.rows()).sum()).collect();
        let of_item = |item: usize| begins[kinds.iter().position(|kind| *kind == patches.kind(item)).unwrap_or(0)];
        let columns = patches.grid[1];
        let place = |item: usize, patch: usize| {
            let ([rows_kept, columns_kept], [row, column]) = (patches.sizes[item], [patch / columns, patch % columns]);
            let inside = row < rows_kept && column < columns_kept;
            of_item(item) + if inside { 2 + row * columns_kept + column } else { 1 }
        };
        let rows = (0..items).flat_map(|item| patches.taken[item].iter().map(move |patch| (item, *patch)));
        let rows = rows.map(|(item, patch)| Some(place(item, patch)));
        let places = gather(&table, &RowIndex::new(table.dim(0)?, (items, patches.length), rows)?)?;
        let class =
            gather(&table, &RowIndex::new(table.dim(0)?, (items, 1), (0..items).map(|item| Some(of_item(item))))?)?;
        roofbench_nn::cost::elementwise(x.elem_count(), 1);
        Ok([class, (x + places)?])
    }

    fn block(&self, kind: Kind) -> Result<Tensor> {
        let Kind { size: [rows, columns], modality } = kind;
        let grid = match [rows, columns] == [self.side; 2] {
            true => self.positions.clone(),
            false => resize::bilinear(&self.positions, (rows, columns), true)?.to_dtype(self.positions.dtype())?,
        };
        let grid = grid.flatten_from(2)?.squeeze(0)?.t()?; // (rows · columns, hidden)
        let block = Tensor::cat(&[&self.class, &self.class.zeros_like()?, &grid], 0)?;
        roofbench_nn::cost::elementwise(block.elem_count(), 1);
        block.broadcast_add(&self.types.narrow(0, modality, 1)?)
    }
}

/// Pictures whose patches have the same positions and modality.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kind {
    /// Rows and columns of patches, its padding left out.
    size: [usize; 2],
    modality: usize,
}

impl Kind {
    /// Of its block in the table of positions.
    fn rows(self) -> usize {
        2 + self.size[0] * self.size[1]
    }
}

/// Which patches of each picture are taken.
struct Patches {
    /// Rows and columns of patches in the frame that all pictures share.
    grid: [usize; 2],
    /// Rows and columns of each picture in it.
    sizes: Vec<[usize; 2]>,
    /// Of each picture the patches that are taken.
    taken: Vec<Vec<usize>>,
    /// Of those the first so many are the picture's own, the others padding.
    own: Vec<usize>,
    /// Patches taken of each picture.
    length: usize,
    /// Pictures in an item of the call.
    images: usize,
}

impl Patches {
    /// `mask` is (items, height, width); without one, every patch is a picture's own.
    fn new(
        cfg: &ViltConfig,
        items: usize,
        images: usize,
        grid: [usize; 2],
        mask: Option<&Tensor>,
    ) -> Result<Self, SessionError> {
        let [rows, columns] = grid;
        let wrong = |item: usize, reason: &str| SessionError::input("pixel_mask", format!("item {item} {reason}"));
        let mut sizes = vec![grid; items];
        let mut kept = vec![(0..rows * columns).collect::<Vec<_>>(); items];
        let mut padding = vec![Vec::new(); items];
        if let Some(mask) = mask {
            let (_, height, width) = mask.dims3()?;
            for (item, mask) in mask.to_vec3::<i64>()?.iter().enumerate() {
                let keeps = |row: usize, column: usize| {
                    mask[resize::nearest(row, height, rows)][resize::nearest(column, width, columns)] == 1
                };
                let is_own = |patch: &usize| keeps(patch / columns, patch % columns);
                sizes[item] = [
                    (0..rows).filter(|row| keeps(*row, 0)).count(),
                    (0..columns).filter(|column| keeps(0, *column)).count(),
                ];
                if sizes[item].contains(&0) {
                    return Err(wrong(
                        item,
                        "masks the first row or column of patches; a picture begins at the top left",
                    ));
                }
                (kept[item], padding[item]) = (0..rows * columns).partition(is_own);
            }
        }
        let most = sizes.iter().map(|[rows, columns]| rows * columns).max().unwrap_or(0);
        let length = usize::try_from(cfg.max_image_length).map_or(most, |limit| most.min(limit));
        let own = kept.iter().map(|kept| kept.len().min(length)).collect();
        for (item, (kept, padding)) in kept.iter_mut().zip(&padding).enumerate() {
            if kept.len() < length && padding.is_empty() {
                return Err(wrong(item, "has no padding that could fill it up"));
            }
            let missing = length.saturating_sub(kept.len());
            kept.extend(padding.iter().cycle().take(missing));
            kept.truncate(length);
        }
        Ok(Self { grid, sizes, taken: kept, own, length, images })
    }

    /// Every patch of every picture, in order.
    fn are_all(&self) -> bool {
        self.length == self.grid[0] * self.grid[1] && self.own.iter().all(|own| *own == self.length)
    }

    fn kind(&self, item: usize) -> Kind {
        Kind { size: self.sizes[item], modality: 1 + item % self.images }
    }

    fn kinds(&self) -> Vec<Kind> {
        let mut kinds = Vec::new();
        for kind in (0..self.sizes.len()).map(|item| self.kind(item)) {
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        kinds
    }
}

/// What follows the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HeadKind {
    Pooler,
    MaskedLm,
    /// Answers to a question about one picture.
    Answers {
        labels: usize,
    },
    Retrieval,
    /// Labels of a text about so many pictures.
    Images {
        labels: usize,
        images: usize,
    },
    Tokens {
        labels: usize,
    },
}

impl HeadKind {
    fn of(spec: &ModelSpec, cfg: &ViltConfig) -> Result<Self, SessionError> {
        let labels = || label_count(&spec.config);
        match spec.class.as_str() {
            "ViltModel" => Ok(Self::Pooler),
            "ViltForMaskedLM" => Ok(Self::MaskedLm),
            "ViltForQuestionAnswering" => Ok(Self::Answers { labels: labels()? }),
            "ViltForImageAndTextRetrieval" => Ok(Self::Retrieval),
            "ViltForTokenClassification" => Ok(Self::Tokens { labels: labels()? }),
            "ViltForImagesAndTextClassification" => match usize::try_from(cfg.num_images) {
                Ok(images @ 1..) if images < cfg.modality_type_vocab_size => {
                    Ok(Self::Images { labels: labels()?, images })
                }
                _ => {
                    let reason = format!(
                        "{} is not in 1..modality_type_vocab_size = {}",
                        cfg.num_images, cfg.modality_type_vocab_size
                    );
                    Err(config::invalid("num_images", reason))
                }
            },
            _ => Err(config::unsupported_class(spec, CLASSES)),
        }
    }

    /// Pictures in an item of the call.
    fn images(self) -> usize {
        if let Self::Images { images, .. } = self { images } else { 1 }
    }

    /// The first rows of the last layer that it reads, when that is not all, for texts of `words`.
    fn rows(self, words: usize) -> Option<usize> {
        match self {
            Self::Pooler => None,
            Self::MaskedLm | Self::Tokens { .. } => Some(words),
            Self::Answers { .. } | Self::Retrieval | Self::Images { .. } => Some(1),
        }
    }

    /// Width of the hidden layer of a head that has one.
    fn inner(self, hidden: usize) -> usize {
        if let Self::Images { images, .. } = self { images * hidden } else { 2 * hidden }
    }
}

/// The layers of a [`HeadKind`].
enum Head {
    Pooler(Pooler),
    MaskedLm(PredictionHead),
    /// The pooled state, or those of all pictures, through two layers.
    Classifier {
        pooler: Pooler,
        dense: Linear,
        norm: LayerNorm,
        output: Linear,
    },
    Retrieval {
        pooler: Pooler,
        rank_output: Linear,
    },
    Tokens {
        classifier: Linear,
    },
}

impl Head {
    /// `vb` is the checkpoint's root, `vilt` the encoder's part of it.
    fn load(
        kind: HeadKind,
        cfg: &ViltConfig,
        vb: VarBuilder,
        vilt: VarBuilder,
        text: &bert::Embeddings,
    ) -> Result<Self> {
        let hidden = cfg.hidden_size;
        let pooler = || Pooler::load(hidden, vilt.pp("pooler"));
        Ok(match kind {
            HeadKind::Pooler => Self::Pooler(pooler()?),
            HeadKind::MaskedLm => {
                Pooler::skip(hidden, vilt.pp("pooler"))?;
                let vb = vb.pp("mlm_score");
                let decoder = match cfg.tie_word_embeddings {
                    true => text.word_embeddings.output(Some(&vb.get(cfg.vocab_size, "decoder.bias")?))?,
                    false => Linear::load(hidden, cfg.vocab_size, true, vb.pp("decoder"))?,
                };
                Self::MaskedLm(PredictionHead::load(cfg.hidden_act, cfg.layer_norm_eps, decoder, vb.pp("transform"))?)
            }
            HeadKind::Answers { labels } | HeadKind::Images { labels, .. } => {
                let (width, inner) = (kind.images() * hidden, kind.inner(hidden));
                Self::Classifier {
                    pooler: pooler()?,
                    dense: Linear::load(width, inner, true, vb.pp("classifier.0"))?,
                    norm: LayerNorm::load(inner, HEAD_EPS, vb.pp("classifier.1"))?,
                    output: Linear::load(inner, labels, true, vb.pp("classifier.3"))?,
                }
            }
            HeadKind::Retrieval => {
                Self::Retrieval { pooler: pooler()?, rank_output: Linear::load(hidden, 1, true, vb.pp("rank_output"))? }
            }
            HeadKind::Tokens { labels } => {
                Self::Tokens { classifier: Linear::load(hidden, labels, true, vb.pp("classifier"))? }
            }
        })
    }

    /// Output fields of the class from the normed rows that it reads.
    fn forward(&self, x: Tensor) -> Result<Tensors> {
        let logits = match self {
            Self::Pooler(pooler) => {
                let pooled = pooler.forward(&x)?; // (batch, hidden)
                return Ok(Tensors::from([("last_hidden_state".into(), x), ("pooler_output".into(), pooled)]));
            }
            Self::MaskedLm(head) => head.forward(&x)?, // (batch, words, vocab)
            Self::Classifier { pooler, dense, norm, output } => {
                // pictures of an item lie side by side
                let pooled = pooler.forward(&x)?.reshape(((), dense.in_dim()))?;
                output.forward(&norm.forward_act(&dense.forward(&pooled)?, Activation::Gelu)?)? // (batch, labels)
            }
            Self::Retrieval { pooler, rank_output } => rank_output.forward(&pooler.forward(&x)?)?, // (batch, 1)
            Self::Tokens { classifier } => classifier.forward(&x)?, // (batch, words, labels)
        };
        Ok(Tensors::from([("logits".into(), logits)]))
    }
}

/// Of the norm in a head, torch's own.
const HEAD_EPS: f64 = 1e-5;

/// The encoder with the head of its class.
pub struct ViltModel {
    cfg: ViltConfig,
    text_embeddings: bert::Embeddings,
    visual_embeddings: VisualEmbeddings,
    encoder: Encoder,
    layernorm: LayerNorm,
    head: Head,
    kind: HeadKind,
    dtype: DType,
    device: Device,
    paths: BTreeMap<String, String>,
}

impl ViltModel {
    /// Loads the class of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// Names the config field or the tensor at fault, or the class when it is none of [`CLASSES`].
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let cfg = ViltConfig::from_spec(spec)?;
        let kind = HeadKind::of(spec, &cfg)?;
        let vilt = if kind == HeadKind::Pooler { vb.clone() } else { vb.pp("vilt") };
        let embeddings = vilt.pp("embeddings");
        let text_embeddings = bert::Embeddings::load(&cfg.bert(), embeddings.pp("text_embeddings"))?;
        Ok(Self {
            visual_embeddings: VisualEmbeddings::load(&cfg, embeddings)?,
            encoder: Encoder::load(&cfg.encoder(), kind.rows(1).is_some(), vilt.pp("encoder"))?,
            layernorm: LayerNorm::load(cfg.hidden_size, cfg.layer_norm_eps, vilt.pp("layernorm"))?,
            head: Head::load(kind, &cfg, vb, vilt, &text_embeddings)?,
            text_embeddings,
            kind,
            dtype: spec.dtype,
            device: spec.device.clone(),
            paths: isa::paths(&spec.device, spec.dtype),
            cfg,
        })
    }

    fn forward(&self, pairs: &Pairs) -> Result<Tensors> {
        let text = self.text_embeddings.forward(&pairs.ids)?; // (batch, words, hidden)
        let (batch, words, hidden) = text.dims3()?;
        roofbench_nn::cost::elementwise(text.elem_count(), 1);
        let text = text.broadcast_add(&self.visual_embeddings.types.narrow(0, 0, 1)?)?;
        let images = pairs.patches.images;
        let text = text.unsqueeze(1)?.broadcast_as((batch, images, words, hidden))?.reshape(((), words, hidden))?;

        let dtype = activation_dtype(self.dtype, &self.device);
        let pixel_values = pairs.pixel_values.to_device(&self.device)?.to_dtype(dtype)?;
        let [class, patches] = self.visual_embeddings.forward(&pixel_values, &pairs.patches)?;
        let x = Tensor::cat(&[&text, &class, &patches], 1)?; // (items, words + 1 + length, hidden)
        let x = self.encoder.forward(x, &self.kind.rows(words).into(), pairs.mask()?.as_ref())?;
        self.head.forward(self.layernorm.forward(&x)?)
    }
}

/// The arguments of `forward`, checked.
struct Pairs {
    ids: TokenIds,
    /// (items, channels, height, width), where an item of the batch has one or several.
    pixel_values: Tensor,
    patches: Patches,
}

impl Pairs {
    fn read(cfg: &ViltConfig, kind: HeadKind, call: &Call) -> Result<Self, SessionError> {
        let known = ["input_ids", "attention_mask", "token_type_ids", "pixel_values", "pixel_mask"];
        let inputs = Inputs::forward(call, &known, &[])?;
        let ids = TokenIds::of(&cfg.bert(), &inputs, "input_ids")?;
        let (batch, images) = (ids.input_ids.dim(0)?, kind.images());
        let Some(pixel_values) = call.inputs.get("pixel_values").filter(|values| values.rank() > 0) else {
            return Err(SessionError::input("pixel_values", "is missing, or has no shape"));
        };
        // one picture to a text, or, for the class that takes several, a row of them
        let row = matches!(kind, HeadKind::Images { .. }) && pixel_values.rank() == 5;
        let (shape, frame) = pixel_values.dims().split_at(if row { 2 } else { 1 });
        let expected = if row { &[batch, images][..] } else { &[batch] };
        let sizes = match *frame {
            [channels, height, width] if shape == expected && (row || images == 1) => Some([channels, height, width]),
            _ => None,
        };
        let fits = |[channels, height, width]: &[usize; 3]| {
            *channels == cfg.num_channels && *height.min(width) >= cfg.patch_size && pixel_values.dtype().is_float()
        };
        let Some([channels, height, width]) = sizes.filter(fits) else {
            let reason = format!(
                "is {:?} of shape {:?}, expected floats (batch = {batch}, {}channels = {}, height, width), a patch of {} \
                 or more",
                pixel_values.dtype(),
                pixel_values.dims(),
                if images > 1 { format!("images = {images}, ") } else { String::new() },
                cfg.num_channels,
                cfg.patch_size
            );
            return Err(SessionError::input("pixel_values", reason));
        };
        let grid = [height / cfg.patch_size, width / cfg.patch_size];
        let items = batch * images;
        let pixel_values = pixel_values.reshape((items, channels, height, width))?;
        let mask = match call.inputs.get("pixel_mask") {
            None => None,
            Some(mask) => {
                let rank = mask.rank();
                let sides = mask.dims().get(rank.saturating_sub(2)..).unwrap_or_default().to_vec();
                let shape = [shape, &sides].concat();
                let Some(mask) = inputs.integers("pixel_mask", &shape)?.filter(|mask| mask.elem_count() > 0) else {
                    return Err(SessionError::input("pixel_mask", "is empty"));
                };
                zero_or_one("pixel_mask", &mask)?;
                Some(mask.reshape((items, sides[0], sides[1]))?)
            }
        };
        let patches = Patches::new(cfg, items, images, grid, mask.as_ref())?;
        Ok(Self { ids, pixel_values, patches })
    }

    /// Which rows of the sequence exist.
    fn mask(&self) -> Result<Option<Mask>> {
        let (batch, words) = self.ids.input_ids.dims2()?;
        let text = match &self.ids.attention_mask {
            Some(mask) => mask.to_vec2::<i64>()?,
            None => vec![vec![1; words]; batch],
        };
        let Patches { own, length, images, .. } = &self.patches;
        let mut rows = Vec::with_capacity(own.len() * (words + 1 + length));
        for (item, own) in own.iter().enumerate() {
            rows.extend(&text[item / images]);
            rows.push(1);
            rows.extend((0..*length).map(|patch| i64::from(patch < *own)));
        }
        Mask::padding(&Tensor::from_vec(rows, (own.len(), words + 1 + length), &Device::Cpu)?)
    }
}

impl Session for ViltModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let outputs = self.forward(&Pairs::read(&self.cfg, self.kind, call)?)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let pairs = Pairs::read(&self.cfg, self.kind, call)?;
        let cost = forward_cost(&self.cfg, self.kind, &pairs, self.dtype.size_in_bytes() as u64)?;
        Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }])
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// FLOPs and bytes of one forward pass.
fn forward_cost(cfg: &ViltConfig, kind: HeadKind, pairs: &Pairs, bytes: u64) -> Result<Cost> {
    let (batch, words) = pairs.ids.input_ids.dims2()?;
    let Patches { grid, length, images, sizes, .. } = &pairs.patches;
    let (items, hidden) = (sizes.len(), cfg.hidden_size);
    let wide = |rows: usize| (rows * hidden) as u64;
    let patches = cost::Conv2d {
        batch: items as u64,
        in_channels: cfg.num_channels as u64,
        out_channels: hidden as u64,
        kernel: [cfg.patch_size as u64; 2],
        groups: 1,
        output: grid.map(|n| n as u64),
        bias: true,
    };
    let text = bert::Embeddings::cost(&cfg.bert(), [batch, words], bytes) + cost::elementwise(wide(batch * words), 1);
    // for each kind of picture: its modality added to its positions, which are a sum of four neighbours
    let kind_of_picture = |kind: &Kind| {
        let stretched = if kind.size == [cfg.side(); 2] { 0 } else { 2 * 4 * wide(kind.rows() - 2) };
        let read = Cost { weight_bytes: wide(kind.rows()) * bytes, ..Cost::default() };
        read + cost::elementwise(wide(kind.rows()), 1) + cost::elementwise(stretched, 1)
    };
    let pictures = cost::input(pairs.pixel_values.elem_count() as u64, bytes)
        + patches.cost(bytes)
        + pairs.patches.kinds().iter().map(kind_of_picture).sum()
        + cost::elementwise(wide(items * length), 1); // positions added
    let seq = words + 1 + length;
    let rows = kind.rows(words);
    let read = items * rows.unwrap_or(seq);

    let linear =
        |rows: usize, input: usize, output: usize| cost::linear(rows as u64, input as u64, output as u64, true, bytes);
    let norm = |rows: usize, width: usize| cost::norm(Norm::Layer, rows as u64, width as u64, bytes);
    let pooler = || Pooler::cost(items, hidden, bytes);
    let head = match kind {
        HeadKind::Pooler => pooler(),
        HeadKind::MaskedLm => PredictionHead::cost(batch * words, hidden, cfg.vocab_size, bytes),
        HeadKind::Answers { labels } | HeadKind::Images { labels, .. } => {
            let inner = kind.inner(hidden);
            pooler()
                + linear(batch, images * hidden, inner)
                + norm(batch, inner)
                + cost::elementwise((batch * inner) as u64, 1)
                + linear(batch, inner, labels)
        }
        HeadKind::Retrieval => pooler() + linear(batch, hidden, 1),
        HeadKind::Tokens { labels } => linear(batch * words, hidden, labels),
    };
    Ok(text
        + pictures
        + Encoder::cost(&cfg.encoder(), [items, seq], rows.unwrap_or(seq), bytes)
        + norm(read, hidden)
        + head)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(class: &str, changes: Value) -> ModelSpec {
        let mut config = json!({
            "vocab_size": 10, "max_position_embeddings": 6, "hidden_size": 4, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 6, "image_size": 4, "patch_size": 2, "num_channels": 1,
            "num_labels": 3,
        });
        for (field, value) in changes.as_object().expect("an object") {
            config[field] = value.clone();
        }
        ModelSpec::new("vilt", class, config)
    }

    fn call(words: usize, pixels: &[usize], mask: Option<&Tensor>) -> Call {
        let batch = pixels[0];
        let mut inputs = Tensors::from([
            ("input_ids".into(), Tensor::zeros((batch, words), DType::I64, &Device::Cpu).expect("ids")),
            ("pixel_values".into(), Tensor::zeros(pixels, DType::F32, &Device::Cpu).expect("pixels")),
        ]);
        inputs.extend(mask.map(|mask| ("pixel_mask".to_owned(), mask.clone())));
        Call { method: "forward".into(), inputs, ..Call::default() }
    }

    fn read(class: &str, changes: Value, call: &Call) -> Result<Pairs, SessionError> {
        let spec = spec(class, changes);
        let cfg = ViltConfig::from_spec(&spec)?;
        Pairs::read(&cfg, HeadKind::of(&spec, &cfg)?, call)
    }

    fn message<T>(result: Result<T, SessionError>) -> String {
        result.err().map(|error| error.to_string()).unwrap_or_default()
    }

    /// Two pictures in a frame of 2 x 3 patches: one fills 2 x 2, the other 1 x 3.
    fn mask() -> Tensor {
        let mask: Vec<i64> = (0..2 * 4 * 6)
            .map(|i| (i / 24, i / 6 % 4, i % 6))
            .map(|(item, row, column)| i64::from(if item == 0 { column < 4 } else { row < 2 }))
            .collect();
        Tensor::from_vec(mask, (2, 4, 6), &Device::Cpu).expect("a mask")
    }

    #[test]
    fn patches_that_are_taken_are_a_pictures_own_and_then_padding() {
        let call = call(2, &[2, 1, 4, 6], Some(&mask()));
        let pairs = read("ViltModel", json!({}), &call).expect("a call");
        let Patches { sizes, taken, own, length, .. } = &pairs.patches;
        assert_eq!((&sizes[..], *length), (&[[2, 2], [1, 3]][..], 4));
        assert_eq!((&taken[0][..], &taken[1][..]), (&[0, 1, 3, 4][..], &[0, 1, 2, 3][..]));
        assert_eq!(own, &[4, 3]);
        assert!(!pairs.patches.are_all());
        let limited = read("ViltModel", json!({"max_image_length": 2}), &call).expect("a call");
        assert_eq!(
            (&limited.patches.taken[..], &limited.patches.own[..]),
            (&[vec![0, 1], vec![0, 1]][..], &[2, 2][..])
        );
        let whole = read("ViltModel", json!({}), &self::call(2, &[2, 1, 4, 6], None)).expect("a call");
        assert!(whole.patches.are_all());
        assert_eq!(whole.patches.kinds(), [Kind { size: [2, 3], modality: 1 }]);
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let one = call(2, &[1, 1, 4, 4], None);
        assert_eq!(message(read("ViltModel", json!({}), &one)), "");
        for (changes, start) in [
            (json!({"hidden_size": 5}), "config.json: `hidden_size`: 5 is not a multiple of num_attention_heads, 2"),
            (json!({"patch_size": 5}), "config.json: `patch_size`: is larger than image_size"),
            (json!({"max_image_length": 0}), "config.json: `max_image_length`: 0 leaves no patch"),
            (json!({"hidden_act": "maxout"}), "config.json: `hidden_act`: activation `maxout` is not supported"),
        ] {
            let found = message(read("ViltModel", changes, &one));
            assert!(found.starts_with(start), "{found}");
        }
        let class = "ViltForImagesAndTextClassification";
        assert!(message(read(class, json!({}), &one)).starts_with("config.json: `num_images`: -1 is not in 1.."));
        let two = json!({"num_images": 2, "modality_type_vocab_size": 3});
        assert!(
            message(read(class, two.clone(), &one)).starts_with("input `pixel_values`: is F32 of shape [1, 1, 4, 4]")
        );
        assert_eq!(message(read(class, two, &call(2, &[1, 2, 1, 4, 4], None))), "");
        assert!(message(read("ViltForPreTraining", json!({}), &one)).contains("`ViltForPreTraining` is not supported"));

        let error = message(read("ViltModel", json!({}), &call(2, &[1, 1, 1, 4], None)));
        assert!(error.starts_with("input `pixel_values`: is F32 of shape [1, 1, 1, 4]"), "{error}");
        assert!(
            message(read("ViltModel", json!({}), &call(7, &[1, 1, 4, 4], None))).contains("max_position_embeddings")
        );
        let nothing = Tensor::zeros((1, 4, 4), DType::I64, &Device::Cpu).expect("a mask");
        let error = message(read("ViltModel", json!({}), &call(2, &[1, 1, 4, 4], Some(&nothing))));
        assert!(error.starts_with("input `pixel_mask`: item 0 masks the first row"), "{error}");
    }

    /// 2 words, and 4 patches behind the class token: 7 rows of width 4, inner width 6, 2 heads of 2, 3 labels.
    #[test]
    fn cost_by_hand() {
        let spec = spec("ViltForQuestionAnswering", json!({}));
        let cfg = ViltConfig::from_spec(&spec).expect("a config");
        let kind = HeadKind::of(&spec, &cfg).expect("a class");
        let pairs = Pairs::read(&cfg, kind, &call(2, &[1, 1, 4, 4], None)).expect("a call");
        let text = 2 * 8 + 7 * 8 + 8; // two additions, norm, modality
        let picture = 2 * (4 * 4) * 4 + 4 * 4 + 6 * 4 + 4 * 4; // patches with bias, modality to 6 rows, positions to 4
        let layer = 7 * 7 * 4 // norm
            + 2 * 7 * 4 * 8 + 7 * 8 + 2 * 4 * 4 + 4 // key and value of all, query of the first row
            + 2 * (2 * 7) * 2 * 2 + 5 * (2 * 7) // two products over 7 pairs of 2 heads, softmax
            + 2 * 4 * 4 + 4 + 4 + 7 * 4 // output, residual, norm
            + 2 * 4 * 6 + 6 + 6 + 2 * 6 * 4 + 4 + 4; // up, activation, down, residual
        let head = 7 * 4 // norm
            + 2 * 4 * 4 + 4 + 4 // pooler and its tanh
            + 2 * 4 * 8 + 8 + 7 * 8 + 8 // hidden layer, its norm and activation
            + 2 * 8 * 3 + 3;
        assert_eq!(forward_cost(&cfg, kind, &pairs, 4).expect("a cost").flops, text + picture + layer + head);
    }

    #[test]
    fn alias_rules_depend_on_tying() {
        let first = |class: &str, changes: Value| aliases(&spec(class, changes))[0].pattern.contains("decoder");
        assert!(first("ViltForMaskedLM", json!({})));
        assert!(!first("ViltForMaskedLM", json!({"tie_word_embeddings": false})));
        assert!(!first("ViltModel", json!({})));
    }
}
