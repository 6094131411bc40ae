//! FLAVA: an encoder of pictures, one of text, and one that reads what both made.
//! Source: FLAVA (arXiv:2112.04482); the codebook of pictures is DALL-E's (arXiv:2102.12092). Mirrors
//! `transformers.FlavaModel`, `FlavaForPreTraining` and `FlavaImageCodebook`.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, Norm, PhaseCost};
use roofbench_core::inputs::{Inputs, in_range, zero_or_one};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Mask, Rows};
use roofbench_nn::conv::{Conv2d, Conv2dConfig, to_channels_first, to_channels_last};
use roofbench_nn::kernels::isa;
use roofbench_nn::linear::Linear;
use roofbench_nn::norm::LayerNorm;
use roofbench_nn::pooling::{Pool2dConfig, max_pool_2d};
use roofbench_text::models::bert::{self, BertConfig, Pooler, PredictionHead, TokenIds};
use roofbench_vision::models::vit::{self, Encoder, EncoderConfig, ViTConfig};
use roofbench_vision::models::{HeightWidth, activation_dtype};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::{behind, forward_phase};

/// The classes that run.
pub const CLASSES: &[&str] = &["FlavaModel", "FlavaForPreTraining", "FlavaImageCodebook"];

/// From names in published checkpoints to those of the class.
const RULES: &[AliasRule] = &[
    // integer buffers
    AliasRule::drop(r"\.(position_ids|token_type_ids)$", AliasScope::Always),
    // the same bias under two names
    AliasRule::rename(
        r"^(mim_head|mlm_head|mmm_image_head|mmm_text_head)\.bias$",
        "$1.decoder.bias",
        AliasScope::Always,
    ),
    // FlavaModel out of what FlavaForPreTraining saved, and the other way round
    AliasRule::drop(r"^(image_codebook|(mim|mlm|itm|mmm_image|mmm_text)_head)\.", AliasScope::Base),
    AliasRule::rename(r"^flava\.", "", AliasScope::Base),
    AliasRule::rename(
        r"^((?:image|text|multimodal)_model\.|(?:image|text)(?:_to_mm)?_projection\.|logit_scale$)",
        "flava.$1",
        AliasScope::Class("FlavaForPreTraining"),
    ),
    // the codebook out of the same
    AliasRule::drop(r"^(flava|(mim|mlm|itm|mmm_image|mmm_text)_head)\.", AliasScope::Class("FlavaImageCodebook")),
    AliasRule::rename(r"^image_codebook\.", "", AliasScope::Class("FlavaImageCodebook")),
];

/// How published checkpoints name the tensors of a class.
pub fn aliases(_: &ModelSpec) -> &'static [AliasRule] {
    RULES
}

/// The layers of one encoder; `num_hidden_layers` is that of pictures and text.
macro_rules! encoder_config {
    ($(#[$doc:meta])* $name:ident, layers: $layers:literal, $($(#[$field_doc:meta])* $field:ident: $type:ty = $default:expr,)*) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Deserialize)]
        #[serde(default)]
        pub struct $name {
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
            /// Added to the variance in every normalisation.
            pub layer_norm_eps: f64,
            /// The products of query, key and value have biases.
            pub qkv_bias: bool,
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl Default for $name {
            fn default() -> Self {
                Self {
                    hidden_size: 768,
                    num_hidden_layers: $layers,
                    num_attention_heads: 12,
                    intermediate_size: 3072,
                    hidden_act: Activation::Gelu,
                    layer_norm_eps: 1e-12,
                    qkv_bias: true,
                    $($field: $default,)*
                }
            }
        }

        impl $name {
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
    };
}

encoder_config! {
    /// `image_config`; field names and defaults are those of `transformers.FlavaImageConfig`.
    FlavaImageConfig, layers: 12,
    /// Size of the pictures.
    image_size: HeightWidth = HeightWidth { height: 224, width: 224 },
    /// Size of a patch.
    patch_size: HeightWidth = HeightWidth { height: 16, width: 16 },
    /// Colour channels.
    num_channels: usize = 3,
    /// There is a token for masked patches.
    mask_token: bool = true,
    /// Words of the codebook.
    vocab_size: usize = 8192,
}

encoder_config! {
    /// `text_config`; field names and defaults are those of `transformers.FlavaTextConfig`.
    FlavaTextConfig, layers: 12,
    /// Distinct words.
    vocab_size: usize = 30522,
    /// Distinct segments.
    type_vocab_size: usize = 2,
    /// Longest text.
    max_position_embeddings: usize = 512,
}

encoder_config! {
    /// `multimodal_config`; field names and defaults are those of `transformers.FlavaMultimodalConfig`.
    FlavaMultimodalConfig, layers: 6,
    /// A token of its own stands before the rows of picture and text.
    use_cls_token: bool = true,
}

/// `image_codebook_config`; field names and defaults are those of `transformers.FlavaImageCodebookConfig`.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct FlavaImageCodebookConfig {
    /// Only a part of the factor on each residual: there are always four groups.
    pub num_groups: usize,
    /// Colour channels.
    pub input_channels: usize,
    /// Blocks in each group.
    pub num_blocks_per_group: usize,
    /// Channels of the first group.
    pub hidden_size: usize,
    /// Words.
    pub vocab_size: usize,
}

impl Default for FlavaImageCodebookConfig {
    fn default() -> Self {
        Self { num_groups: 4, input_channels: 3, num_blocks_per_group: 2, hidden_size: 256, vocab_size: 8192 }
    }
}

impl FlavaImageCodebookConfig {
    fn check(&self) -> Result<(), SessionError> {
        config::sizes(&[
            ("num_groups", self.num_groups),
            ("input_channels", self.input_channels),
            ("num_blocks_per_group", self.num_blocks_per_group),
            ("hidden_size", self.hidden_size),
            ("vocab_size", self.vocab_size),
        ])?;
        // the first group's path narrows to a quarter
        match self.hidden_size {
            4.. => Ok(()),
            narrow => Err(config::invalid("hidden_size", format!("{narrow} is less than 4"))),
        }
    }
}

/// The part of `config.json` that shapes the computation; field names and defaults are the class's own.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct FlavaConfig {
    /// Of the encoder of pictures.
    #[serde(deserialize_with = "or_default")]
    pub image_config: FlavaImageConfig,
    /// Of the encoder of text.
    #[serde(deserialize_with = "or_default")]
    pub text_config: FlavaTextConfig,
    /// Of the encoder of both.
    #[serde(deserialize_with = "or_default")]
    pub multimodal_config: FlavaMultimodalConfig,
    /// Of the codebook.
    #[serde(deserialize_with = "or_default")]
    pub image_codebook_config: FlavaImageCodebookConfig,
    /// Width of the head that tells pairs from others.
    pub hidden_size: usize,
    /// Width in which pictures and text are compared.
    pub projection_dim: usize,
    /// `FlavaForPreTraining` holds a codebook.
    pub init_codebook: bool,
    /// Above 0 where masked patches of pictures alone are predicted; as the weights that follow for their heads.
    pub mim_weight: f64,
    /// Masked words of text alone.
    pub mlm_weight: f64,
    /// Similarity of every picture to every text.
    pub global_contrastive_weight: f64,
    /// Whether picture and text belong together.
    pub itm_weight: f64,
    /// Masked patches of pairs.
    pub mmm_image_weight: f64,
    /// Masked words of pairs.
    pub mmm_text_weight: f64,
    /// `FlavaForPreTraining` joins only what is masked.
    pub skip_unmasked_multimodal_encoder: bool,
    /// `FlavaForPreTraining` computes losses unless the call says otherwise.
    pub return_loss: bool,
}

impl Default for FlavaConfig {
    fn default() -> Self {
        Self {
            image_config: Default::default(),
            text_config: Default::default(),
            multimodal_config: Default::default(),
            image_codebook_config: Default::default(),
            hidden_size: 768,
            projection_dim: 768,
            init_codebook: true,
            mim_weight: 1.0,
            mlm_weight: 1.0,
            global_contrastive_weight: 1.0,
            itm_weight: 1.0,
            mmm_image_weight: 1.0,
            mmm_text_weight: 1.0,
            skip_unmasked_multimodal_encoder: true,
            return_loss: true,
        }
    }
}

/// A part that is `null` counts as left out.
fn or_default<'de, T: Deserialize<'de> + Default, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl FlavaConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is malformed, contradicts another, or isn't supported.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        for old in ["image_config_dict", "text_config_dict", "multimodal_config_dict", "image_codebook_config_dict"] {
            config::refuse_unless(spec, old, &[])?;
        }
        let cfg: Self = spec.parse_config()?;
        let image = &cfg.image_config;
        config::sizes(&[
            ("hidden_size", cfg.hidden_size),
            ("projection_dim", cfg.projection_dim),
            ("image_config.image_size", image.image_size.height),
            ("image_config.image_size", image.image_size.width),
            ("image_config.patch_size", image.patch_size.height),
            ("image_config.patch_size", image.patch_size.width),
            ("image_config.num_channels", image.num_channels),
            ("image_config.vocab_size", image.vocab_size),
            ("text_config.vocab_size", cfg.text_config.vocab_size),
            ("text_config.type_vocab_size", cfg.text_config.type_vocab_size),
            ("text_config.max_position_embeddings", cfg.text_config.max_position_embeddings),
        ])?;
        for (part, encoder) in [
            ("image_config", image.encoder()),
            ("text_config", cfg.text_config.encoder()),
            ("multimodal_config", cfg.multimodal_config.encoder()),
        ] {
            let field = |name: &str| format!("{part}.{name}");
            let heads = (&*field("num_attention_heads"), encoder.num_attention_heads);
            config::sizes(&[
                (&field("hidden_size"), encoder.hidden_size),
                (&field("num_hidden_layers"), encoder.num_hidden_layers),
                heads,
                (&field("intermediate_size"), encoder.intermediate_size),
            ])?;
            config::multiple((&field("hidden_size"), encoder.hidden_size), heads)?;
            config::not_negative(&[(&field("layer_norm_eps"), encoder.layer_norm_eps)])?;
        }
        if cfg.vit().patches(image.image_size).contains(&0) {
            return Err(config::invalid("image_config.patch_size", "is larger than image_size"));
        }
        cfg.image_codebook_config.check()?;
        Ok(cfg)
    }

    /// The picture's embeddings.
    fn vit(&self) -> ViTConfig {
        let image = &self.image_config;
        ViTConfig {
            hidden_size: image.hidden_size,
            num_hidden_layers: image.num_hidden_layers,
            num_attention_heads: image.num_attention_heads,
            intermediate_size: image.intermediate_size,
            image_size: image.image_size,
            patch_size: image.patch_size,
            num_channels: image.num_channels,
            qkv_bias: image.qkv_bias,
            hidden_act: image.hidden_act,
            layer_norm_eps: image.layer_norm_eps,
            pooler_act: Activation::Tanh,
            pooler_output_size: None,
        }
    }

    /// The text's embeddings.
    fn bert(&self) -> BertConfig {
        let text = &self.text_config;
        BertConfig {
            vocab_size: text.vocab_size,
            hidden_size: text.hidden_size,
            num_hidden_layers: text.num_hidden_layers,
            num_attention_heads: text.num_attention_heads,
            intermediate_size: text.intermediate_size,
            max_position_embeddings: text.max_position_embeddings,
            type_vocab_size: text.type_vocab_size,
            hidden_act: text.hidden_act,
            layer_norm_eps: text.layer_norm_eps,
            tie_word_embeddings: false,
        }
    }

    fn image_patches(&self) -> usize {
        self.vit().patches(self.image_config.image_size).iter().product()
    }
}

/// Layers, the norm behind them, and the pooler.
struct Tower {
    encoder: Encoder,
    layernorm: LayerNorm,
    pooler: Pooler,
}

/// What a [`Tower`] makes.
#[derive(Clone)]
struct States {
    /// Of the last layer.
    last: Tensor,
    /// Its norm.
    normed: Tensor,
    pooled: Tensor,
}

impl Tower {
    fn load(cfg: &EncoderConfig, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            encoder: Encoder::load(cfg, false, vb.pp("encoder"))?,
            layernorm: LayerNorm::load(cfg.hidden_size, cfg.layer_norm_eps, vb.pp("layernorm"))?,
            pooler: Pooler::load(cfg.hidden_size, vb.pp("pooler"))?,
        })
    }

    /// `x` is (batch, seq, hidden).
    fn forward(&self, x: Tensor, mask: Option<&Mask>) -> Result<States> {
        let last = self.encoder.forward(x, &Rows::All, mask)?;
        let normed = self.layernorm.forward(&last)?;
        let pooled = self.pooler.forward(&normed)?;
        Ok(States { last, normed, pooled })
    }

    fn cost(cfg: &EncoderConfig, [batch, seq]: [usize; 2], bytes: u64) -> Cost {
        Encoder::cost(cfg, [batch, seq], seq, bytes)
            + cost::norm(Norm::Layer, (batch * seq) as u64, cfg.hidden_size as u64, bytes)
            + Pooler::cost(batch, cfg.hidden_size, bytes)
    }
}

impl States {
    /// The items from `begin` on, `count` of them.
    fn narrow(&self, begin: usize, count: usize) -> Result<Self> {
        let part = |x: &Tensor| x.narrow(0, begin, count);
        Ok(Self { last: part(&self.last)?, normed: part(&self.normed)?, pooled: part(&self.pooled)? })
    }

    /// As fields of an output, under the names that the class gives them.
    fn into_outputs(self, name: &str, outputs: &mut Tensors) {
        outputs.insert(format!("{name}_embeddings"), self.normed);
        outputs.insert(format!("{name}_output.pooler_output"), self.pooled);
    }
}

/// The three encoders.
struct Encoders {
    image_embeddings: vit::Embeddings,
    image_model: Tower,
    text_embeddings: bert::Embeddings,
    text_model: Tower,
    multimodal_cls_token: Option<Tensor>, // (1, 1, hidden)
    multimodal_model: Tower,
    image_to_mm_projection: Linear,
    text_to_mm_projection: Linear,
    image_projection: Linear,
    text_projection: Linear,
    /// What similarities are multiplied with.
    scale: f64,
}

impl Encoders {
    fn load(cfg: &FlavaConfig, vb: VarBuilder) -> Result<Self> {
        let [image, text, multimodal] = ["image_model", "text_model", "multimodal_model"].map(|name| vb.pp(name));
        let [image_width, text_width, width] =
            [cfg.image_config.hidden_size, cfg.text_config.hidden_size, cfg.multimodal_config.hidden_size];
        let project = |input: usize, output: usize, name: &str| Linear::load(input, output, true, vb.pp(name));
        let cls_token = || vb.pp("multimodal_model").get((1, 1, width), "cls_token");
        let dtype = activation_dtype(vb.dtype(), vb.device());
        Ok(Self {
            image_embeddings: vit::Embeddings::load(&cfg.vit(), cfg.image_config.mask_token, image.pp("embeddings"))?,
            image_model: Tower::load(&cfg.image_config.encoder(), image)?,
            text_embeddings: bert::Embeddings::load(&cfg.bert(), text.pp("embeddings"))?,
            text_model: Tower::load(&cfg.text_config.encoder(), text)?,
            multimodal_cls_token: match cfg.multimodal_config.use_cls_token {
                true => Some(cls_token()?.to_dtype(dtype)?),
                false => None,
            },
            multimodal_model: Tower::load(&cfg.multimodal_config.encoder(), multimodal)?,
            image_to_mm_projection: project(image_width, width, "image_to_mm_projection")?,
            text_to_mm_projection: project(text_width, width, "text_to_mm_projection")?,
            image_projection: project(image_width, cfg.projection_dim, "image_projection")?,
            text_projection: project(text_width, cfg.projection_dim, "text_projection")?,
            scale: f64::from(vb.get((), "logit_scale")?.to_dtype(DType::F32)?.to_scalar::<f32>()?.exp()),
        })
    }

    /// Both encoders' states as one sequence through the third.
    fn join(&self, image: &States, text: &States, attention_mask: Option<&Tensor>) -> Result<States> {
        let image = self.image_to_mm_projection.forward(&image.last.contiguous()?)?;
        let text = self.text_to_mm_projection.forward(&text.last.contiguous()?)?;
        let (batch, _, hidden) = image.dims3()?;
        let token =
            self.multimodal_cls_token.as_ref().map(|token| token.broadcast_as((batch, 1, hidden))).transpose()?;
        let parts: Vec<&Tensor> = token.iter().chain([&image, &text]).collect();
        let x = Tensor::cat(&parts, 1)?;
        let mask = match attention_mask {
            Some(mask) => {
                let before = x.dim(1)? - mask.dim(1)?;
                Mask::padding(&Tensor::cat(&[&Tensor::ones((batch, before), mask.dtype(), mask.device())?, mask], 1)?)?
            }
            None => None,
        };
        self.multimodal_model.forward(x, mask.as_ref())
    }

    fn join_cost(cfg: &FlavaConfig, batch: usize, words: usize, bytes: u64) -> Cost {
        let [image_width, text_width, width] =
            [cfg.image_config.hidden_size, cfg.text_config.hidden_size, cfg.multimodal_config.hidden_size];
        let rows = 1 + cfg.image_patches();
        let project = |rows: usize, input: usize| cost::linear(rows as u64, input as u64, width as u64, true, bytes);
        let seq = usize::from(cfg.multimodal_config.use_cls_token) + rows + words;
        project(batch * rows, image_width)
            + project(batch * words, text_width)
            + Tower::cost(&cfg.multimodal_config.encoder(), [batch, seq], bytes)
    }

    /// The states of the pictures and, after them in the batch, of the masked ones, where some are wanted `beside`.
    fn image(&self, pixel_values: &Tensor, masked: Option<&Tensor>, beside: bool) -> Result<States> {
        let patches = self.image_embeddings.patches(pixel_values)?;
        let mut x = self.image_embeddings.join(&patches, masked)?;
        if beside {
            x = Tensor::cat(&[&self.image_embeddings.join(&patches, None)?, &x], 0)?;
        }
        self.image_model.forward(x, None)
    }

    fn image_cost(cfg: &FlavaConfig, batch: usize, variants: usize, bytes: u64) -> Cost {
        let (image, rows) = (&cfg.image_config, 1 + cfg.image_patches());
        let join = cost::elementwise((batch * rows * image.hidden_size) as u64, 1);
        vit::Embeddings::cost(&cfg.vit(), batch, image.image_size, bytes)
            + join * (variants as u64 - 1)
            + Tower::cost(&image.encoder(), [variants * batch, rows], bytes)
    }

    /// The states of texts, one batch after the other.
    fn text(&self, texts: &[&TokenIds]) -> Result<States> {
        let x = texts.iter().map(|ids| self.text_embeddings.forward(ids)).collect::<Result<Vec<_>>>()?;
        let masks: Vec<&Tensor> = texts.iter().filter_map(|ids| ids.attention_mask.as_ref()).collect();
        let mask = if masks.is_empty() { None } else { Mask::padding(&Tensor::cat(&masks, 0)?)? };
        self.text_model.forward(Tensor::cat(&x, 0)?, mask.as_ref())
    }

    fn text_cost(cfg: &FlavaConfig, [batch, words]: [usize; 2], variants: usize, bytes: u64) -> Cost {
        bert::Embeddings::cost(&cfg.bert(), [batch, words], bytes) * variants as u64
            + Tower::cost(&cfg.text_config.encoder(), [variants * batch, words], bytes)
    }
}

/// Convolutions from pictures to the words of a vocabulary.
struct ImageCodebook {
    input: Conv2d,
    groups: Vec<Vec<CodebookBlock>>,
    output: Conv2d,
}

struct CodebookBlock {
    id_path: Option<Conv2d>,
    /// Four convolutions, the factor of the residual in the last.
    res_path: [Conv2d; 4],
}

/// Channels of the four groups, in those of the first, before and behind.
const GROUPS: [[usize; 2]; 4] = [[1, 1], [1, 2], [2, 4], [4, 8]];

impl CodebookBlock {
    fn load([input, output]: [usize; 2], gain: f64, vb: VarBuilder) -> Result<Self> {
        let (inner, three) = (output / 4, Conv2dConfig::new(3).padding(1));
        let path = vb.pp("res_path.path");
        let conv = |input: usize, name: &str| Conv2d::load(input, inner, three, true, path.pp(name));
        let last = path.pp("conv_4");
        let weight = (last.get((output, inner, 1, 1), "weight")? * gain)?;
        let bias = (last.get(output, "bias")? * gain)?;
        Ok(Self {
            id_path: match input == output {
                true => None,
                false => Some(Conv2d::load(input, output, Conv2dConfig::new(1), true, vb.pp("id_path"))?),
            },
            res_path: [
                conv(input, "conv_1")?,
                conv(inner, "conv_2")?,
                conv(inner, "conv_3")?,
                Conv2d::new(&weight, Some(&bias), Conv2dConfig::new(1))?,
            ],
        })
    }

    /// (batch, height, width, channels)
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [first, second, third, last] = &self.res_path;
        let inner = first.forward_act(&Activation::Relu.forward(x)?, Activation::Relu)?;
        let inner = third.forward_act(&second.forward_act(&inner, Activation::Relu)?, Activation::Relu)?;
        let residual = self.id_path.as_ref().map_or_else(|| Ok(x.clone()), |conv| conv.forward(x))?;
        last.forward_add(&inner, &residual, Activation::Identity)
    }
}

impl ImageCodebook {
    fn load(cfg: &FlavaImageCodebookConfig, vb: VarBuilder) -> Result<Self> {
        let vb = vb.pp("blocks");
        let gain = ((cfg.num_groups * cfg.num_blocks_per_group) as f64).powi(-2);
        let group = |(g, [input, output]): (usize, [usize; 2])| {
            let block = |i: usize| {
                let input = if i == 1 { input } else { output };
                let channels = [input, output].map(|factor| factor * cfg.hidden_size);
                CodebookBlock::load(channels, gain, vb.pp(format!("group_{}.group.block_{i}", g + 1)))
            };
            (1..=cfg.num_blocks_per_group).map(block).collect()
        };
        let input = Conv2dConfig::new(7).padding(3);
        Ok(Self {
            input: Conv2d::load(cfg.input_channels, cfg.hidden_size, input, true, vb.pp("input"))?,
            groups: GROUPS.into_iter().enumerate().map(group).collect::<Result<_>>()?,
            output: Conv2d::load(
                8 * cfg.hidden_size,
                cfg.vocab_size,
                Conv2dConfig::new(1),
                true,
                vb.pp("output.conv"),
            )?,
        })
    }

    /// (batch, channels, height, width) -> (batch, vocab, height / 8, width / 8).
    fn forward(&self, pixel_values: &Tensor) -> Result<Tensor> {
        let mut x = self.input.forward(&to_channels_last(pixel_values)?)?;
        for (g, group) in self.groups.iter().enumerate() {
            if g > 0 {
                x = max_pool_2d(&x, Pool2dConfig::new(2, 2))?;
            }
            for block in group {
                x = block.forward(&x)?;
            }
        }
        to_channels_first(&self.output.forward(&Activation::Relu.forward(&x)?)?)
    }

    fn cost(cfg: &FlavaImageCodebookConfig, batch: usize, [height, width]: [usize; 2], bytes: u64) -> Cost {
        let conv = |size: [usize; 2], channels: [usize; 2], kernel: u64| {
            let [in_channels, out_channels] = channels.map(|n| n as u64);
            let output = size.map(|n| n as u64);
            cost::Conv2d {
                batch: batch as u64,
                in_channels,
                out_channels,
                kernel: [kernel; 2],
                groups: 1,
                output,
                bias: true,
            }
            .cost(bytes)
        };
        let each =
            |size: [usize; 2], channels: usize| cost::elementwise((batch * size[0] * size[1] * channels) as u64, 1);
        let mut total = cost::input((batch * cfg.input_channels * height * width) as u64, bytes)
            + conv([height, width], [cfg.input_channels, cfg.hidden_size], 7);
        let mut size = [height, width];
        for (g, group) in GROUPS.into_iter().enumerate() {
            let [first, output] = group.map(|factor| factor * cfg.hidden_size);
            if g > 0 {
                size = size.map(|n| n / 2);
            }
            for block in 0..cfg.num_blocks_per_group {
                let (input, inner) = (if block == 0 { first } else { output }, output / 4);
                let identity = if input == output { Cost::default() } else { conv(size, [input, output], 1) };
                total = total
                    + each(size, input)
                    + conv(size, [input, inner], 3)
                    + conv(size, [inner, inner], 3) * 2
                    + each(size, inner) * 3
                    + conv(size, [inner, output], 1)
                    + each(size, output) // added to the identity
                    + identity;
            }
        }
        let channels = 8 * cfg.hidden_size;
        total + each(size, channels) + conv(size, [channels, cfg.vocab_size], 1)
    }
}

/// What `FlavaForPreTraining` predicts.
struct Heads {
    mim_head: PredictionHead,
    mlm_head: PredictionHead,
    itm_pooler: Pooler,
    itm_seq_relationship: Linear,
    mmm_image_head: PredictionHead,
    mmm_text_head: PredictionHead,
}

impl Heads {
    fn load(cfg: &FlavaConfig, vb: VarBuilder) -> Result<Self> {
        let (image, text) = (&cfg.image_config, &cfg.text_config);
        let predict = |hidden: usize, vocab: usize, act: Activation, eps: f64, name: &str| {
            let vb = vb.pp(name);
            PredictionHead::load(act, eps, Linear::load(hidden, vocab, true, vb.pp("decoder"))?, vb.pp("transform"))
        };
        let image_head =
            |name: &str| predict(image.hidden_size, image.vocab_size, image.hidden_act, image.layer_norm_eps, name);
        let text_head =
            |name: &str| predict(text.hidden_size, text.vocab_size, text.hidden_act, text.layer_norm_eps, name);
        Ok(Self {
            mim_head: image_head("mim_head")?,
            mlm_head: text_head("mlm_head")?,
            itm_pooler: Pooler::load(cfg.hidden_size, vb.pp("itm_head.pooler"))?,
            itm_seq_relationship: Linear::load(cfg.hidden_size, 2, true, vb.pp("itm_head.seq_relationship"))?,
            mmm_image_head: image_head("mmm_image_head")?,
            mmm_text_head: text_head("mmm_text_head")?,
        })
    }
}

/// The layers of a class.
enum Class {
    /// `FlavaForPreTraining` has heads.
    Encoders {
        cfg: Box<FlavaConfig>,
        encoders: Box<Encoders>,
        heads: Option<Box<Heads>>,
    },
    Codebook {
        cfg: FlavaImageCodebookConfig,
        codebook: Box<ImageCodebook>,
    },
}

/// One of the [`CLASSES`].
pub struct FlavaModel {
    class: Class,
    dtype: DType,
    device: Device,
    paths: BTreeMap<String, String>,
}

impl FlavaModel {
    /// Loads the class of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// Names the config field or the tensor at fault, or the class when it is none of [`CLASSES`].
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let class = match spec.class.as_str() {
            "FlavaModel" => {
                let cfg = Box::new(FlavaConfig::from_spec(spec)?);
                Class::Encoders { encoders: Box::new(Encoders::load(&cfg, vb)?), heads: None, cfg }
            }
            "FlavaForPreTraining" => {
                let cfg = Box::new(FlavaConfig::from_spec(spec)?);
                if cfg.init_codebook {
                    // held by the class for its losses alone
                    ImageCodebook::load(&cfg.image_codebook_config, vb.pp("image_codebook"))?;
                }
                let encoders = Box::new(Encoders::load(&cfg, vb.pp("flava"))?);
                Class::Encoders { encoders, heads: Some(Box::new(Heads::load(&cfg, vb)?)), cfg }
            }
            "FlavaImageCodebook" => {
                let cfg = match spec.config.get("image_codebook_config") {
                    Some(Value::Object(_)) => FlavaConfig::from_spec(spec)?.image_codebook_config,
                    _ => spec.parse_config()?,
                };
                cfg.check()?;
                Class::Codebook { codebook: Box::new(ImageCodebook::load(&cfg, vb)?), cfg }
            }
            _ => return Err(config::unsupported_class(spec, CLASSES)),
        };
        let paths = isa::paths(&spec.device, spec.dtype);
        Ok(Self { class, dtype: spec.dtype, device: spec.device.clone(), paths })
    }

    fn pixels(&self, values: &Tensor) -> Result<Tensor> {
        values.to_device(&self.device)?.to_dtype(activation_dtype(self.dtype, &self.device))
    }

    /// `FlavaModel`.
    fn encode(&self, encoders: &Encoders, arguments: &Arguments, observer: &mut dyn Observer) -> Result<Tensors> {
        let mut outputs = Tensors::new();
        let masked = arguments.masked.as_ref();
        let image = arguments.pixel_values.map(|values| encoders.image(&self.pixels(values)?, masked, false));
        let image = announced(image.transpose()?, Phase::Vision, observer);
        let text = arguments.text.as_ref().map(|ids| encoders.text(&[ids]));
        let text = announced(text.transpose()?, Phase::Text, observer);
        if let (Some(image), Some(text), true) = (&image, &text, arguments.joins_plain) {
            encoders.join(image, text, arguments.attention_mask())?.into_outputs("multimodal", &mut outputs);
        }
        for (name, states) in [("image", image), ("text", text)] {
            if let Some(states) = states {
                states.into_outputs(name, &mut outputs);
            }
        }
        Ok(outputs)
    }

    /// `FlavaForPreTraining`: what is masked and what is not side by side in a batch.
    fn predict(
        &self,
        cfg: &FlavaConfig,
        encoders: &Encoders,
        heads: &Heads,
        arguments: &Arguments,
        observer: &mut dyn Observer,
    ) -> Result<Tensors> {
        let both = |states: States, twice: bool| {
            let batch = states.last.dim(0)? / if twice { 2 } else { 1 };
            let other = if twice { batch } else { 0 };
            Ok::<_, candle_core::Error>([states.narrow(0, batch)?, states.narrow(other, batch)?])
        };
        let image = match arguments.pixel_values {
            Some(values) => {
                let masked = arguments.masked.as_ref();
                let twice = masked.is_some();
                Some(both(encoders.image(&self.pixels(values)?, masked, twice)?, twice)?)
            }
            None => None,
        };
        let image = announced(image, Phase::Vision, observer);
        let text = match &arguments.text {
            Some(ids) => {
                let texts: Vec<&TokenIds> = [ids].into_iter().chain(&arguments.masked_text).collect();
                Some(both(encoders.text(&texts)?, texts.len() == 2)?)
            }
            None => None,
        };
        let text = announced(text, Phase::Text, observer);
        let mut outputs = Tensors::new();
        let mut give = |name: &str, weight: f64, logits: &dyn Fn() -> Result<Tensor>| {
            if weight > 0.0 {
                outputs.insert(name.to_owned(), logits()?);
            }
            Ok::<_, candle_core::Error>(())
        };
        let mut joined = None;
        match (&image, &text) {
            (Some([plain_image, image]), Some([plain_text, text])) => {
                let pair = encoders.join(image, text, arguments.attention_mask())?;
                let (x, words) = (&pair.normed, text.normed.dim(1)?);
                give("itm_logits", cfg.itm_weight, &|| {
                    heads.itm_seq_relationship.forward(&heads.itm_pooler.forward(x)?)
                })?;
                give("mmm_image_logits", cfg.mmm_image_weight, &|| {
                    let [begin, count] = mmm_image_rows(cfg, x.dim(1)?);
                    heads.mmm_image_head.forward(&x.narrow(1, begin, count)?.contiguous()?)
                })?;
                give("mmm_text_logits", cfg.mmm_text_weight, &|| {
                    heads.mmm_text_head.forward(&x.narrow(1, x.dim(1)? - words, words)?.contiguous()?)
                })?;
                if cfg.global_contrastive_weight > 0.0 {
                    let unit = |projection: &Linear, states: &States| {
                        let x = projection.forward(&states.normed.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?)?;
                        roofbench_nn::cost::elementwise(x.elem_count(), UNIT_FLOPS);
                        x.broadcast_div(&x.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(1e-12)?)
                    };
                    let image = unit(&encoders.image_projection, plain_image)?;
                    let text = unit(&encoders.text_projection, plain_text)?;
                    let (batch, width) = image.dims2()?;
                    roofbench_nn::cost::elementwise(batch * batch, 2 * width + 1);
                    let similar = (image.matmul(&text.t()?)? * encoders.scale)?;
                    give("contrastive_logits_per_text", 1.0, &|| similar.t()?.contiguous())?;
                    give("contrastive_logits_per_image", 1.0, &|| Ok(similar.clone()))?;
                }
                if arguments.joins_plain {
                    joined = Some(encoders.join(plain_image, plain_text, arguments.attention_mask())?);
                }
                pair.into_outputs("multimodal_masked", &mut outputs);
            }
            (Some([_, image]), None) => {
                give("mim_logits", cfg.mim_weight, &|| heads.mim_head.forward(&image.normed.contiguous()?))?;
            }
            (None, Some([_, text])) => {
                give("mlm_logits", cfg.mlm_weight, &|| heads.mlm_head.forward(&text.normed.contiguous()?))?;
            }
            (None, None) => {}
        }
        if let Some(joined) = joined {
            joined.into_outputs("multimodal", &mut outputs);
        }
        for (name, states) in [("image", image), ("text", text)] {
            if let Some([plain, masked]) = states {
                plain.into_outputs(name, &mut outputs);
                masked.into_outputs(&format!("{name}_masked"), &mut outputs);
            }
        }
        Ok(outputs)
    }
}

/// FLOPs per element of bringing rows to length 1: square, sum, divide.
const UNIT_FLOPS: usize = 3;

/// The rows of a pair's sequence from which masked patches are predicted: those behind the tokens of the sequence and of
/// the picture. Without the former the class counts them, too.
fn mmm_image_rows(cfg: &FlavaConfig, seq: usize) -> [usize; 2] {
    let begin = 2.min(seq);
    [begin, cfg.image_patches().min(seq - begin)]
}

/// The arguments of `forward` of `FlavaModel` and `FlavaForPreTraining`, checked.
struct Arguments<'a> {
    /// (batch, channels, height, width)
    pixel_values: Option<&'a Tensor>,
    /// (batch, patches), u8
    masked: Option<Tensor>,
    text: Option<TokenIds>,
    /// Of `FlavaForPreTraining`, where it is another text.
    masked_text: Option<TokenIds>,
    /// What isn't masked goes through the third encoder.
    joins_plain: bool,
}

impl<'a> Arguments<'a> {
    fn read(cfg: &FlavaConfig, pretraining: bool, call: &'a Call) -> Result<Self, SessionError> {
        let shared =
            ["input_ids", "attention_mask", "token_type_ids", "position_ids", "pixel_values", "bool_masked_pos"];
        let (more, plain): (&[&str], &[&str]) = match pretraining {
            true => (&["input_ids_masked"], &["return_loss", "skip_unmasked_multimodal_encoder"]),
            false => (&[], &["skip_multimodal_encoder"]),
        };
        let inputs = Inputs::forward(call, &[&shared[..], more].concat(), plain)?;
        let flag = |name: &str, default: bool| match call.arguments.get(name) {
            None | Some(Value::Null) => Ok(default),
            Some(_) => inputs.flag(name),
        };
        if pretraining && flag("return_loss", cfg.return_loss)? {
            let reason = "true is not supported: losses are for training; set it to false, as config.json has it true";
            return Err(SessionError::input("return_loss", reason));
        }
        let joins_plain = match pretraining {
            true => !flag("skip_unmasked_multimodal_encoder", cfg.skip_unmasked_multimodal_encoder)?,
            false => !flag("skip_multimodal_encoder", false)?,
        };
        let image = &cfg.image_config;
        let pixel_values = match inputs.has("pixel_values") {
            false => None,
            true => Some(inputs.pictures("pixel_values", image.num_channels)?),
        };
        let text = match inputs.has("input_ids") {
            false => None,
            true => Some(TokenIds::of(&cfg.bert(), &inputs, "input_ids")?),
        };
        if let Some(pixel_values) = pixel_values {
            let (_, _, height, width) = pixel_values.dims4()?;
            let HeightWidth { height: rows, width: columns } = image.image_size;
            if (height, width) != (rows, columns) {
                let reason =
                    format!("is {height} x {width} pixels, image_size is {rows} x {columns}; resize the pictures");
                return Err(SessionError::input("pixel_values", reason));
            }
        }
        let masked = match (call.inputs.get("bool_masked_pos"), pixel_values) {
            (None, _) => None,
            (Some(_), Some(_)) if !image.mask_token => {
                return Err(SessionError::input("bool_masked_pos", "needs mask_token in image_config"));
            }
            (Some(_), None) => return Err(SessionError::input("bool_masked_pos", "needs pixel_values")),
            (Some(masked), Some(pixel_values)) => {
                let [rows, columns] = cfg.vit().patches(image.image_size);
                let batch = pixel_values.dim(0)?;
                let shape = if masked.rank() == 3 { vec![batch, rows, columns] } else { vec![batch, rows * columns] };
                let masked = inputs.integers("bool_masked_pos", &shape)?;
                masked.iter().try_for_each(|masked| zero_or_one("bool_masked_pos", masked))?;
                let flat = |masked: Tensor| masked.flatten_from(1)?.to_dtype(DType::U8);
                masked.map(flat).transpose()?
            }
        };
        let masked_text = match &text {
            None if inputs.has("input_ids_masked") => {
                return Err(SessionError::input("input_ids_masked", "needs input_ids"));
            }
            Some(plain) if pretraining && (inputs.has("input_ids_masked") || inputs.has("position_ids")) => {
                // without the positions of the call, as the class has it
                let ids = inputs.matrix_like("input_ids_masked", &plain.input_ids)?.unwrap_or(plain.input_ids.clone());
                in_range("input_ids_masked", &ids, "text_config.vocab_size", cfg.text_config.vocab_size)?;
                let seq = ids.dim(1)?;
                if seq > cfg.text_config.max_position_embeddings {
                    return Err(SessionError::input("input_ids_masked", "is longer than max_position_embeddings"));
                }
                Some(TokenIds {
                    position_ids: Tensor::arange(0, seq as i64, ids.device())?.unsqueeze(0)?,
                    input_ids: ids,
                    attention_mask: plain.attention_mask.clone(),
                    token_type_ids: plain.token_type_ids.clone(),
                })
            }
            _ => None,
        };
        if let (Some(pixel_values), Some(text)) = (pixel_values, &text) {
            let (pictures, texts) = (pixel_values.dim(0)?, text.input_ids.dim(0)?);
            if pictures != texts {
                let reason = format!("holds {pictures} pictures, input_ids {texts} texts");
                return Err(SessionError::input("pixel_values", reason));
            }
            let widths = [image.hidden_size, cfg.text_config.hidden_size, cfg.hidden_size];
            let width = cfg.multimodal_config.hidden_size;
            if pretraining && widths.iter().any(|other| *other != width) {
                let reason = format!("{width} is not that of image_config, text_config and the head: {widths:?}");
                return Err(config::invalid("multimodal_config.hidden_size", reason));
            }
        }
        if pixel_values.is_none() && text.is_none() {
            return Err(SessionError::input("input_ids", "is missing, and so is pixel_values; give one or both"));
        }
        Ok(Self { pixel_values, masked, text, masked_text, joins_plain })
    }

    fn attention_mask(&self) -> Option<&Tensor> {
        self.text.as_ref().and_then(|ids| ids.attention_mask.as_ref())
    }

    /// Pictures, or none.
    fn pictures(&self) -> Result<Option<usize>> {
        self.pixel_values.map(|values| values.dim(0)).transpose()
    }

    /// Texts and their words, or none.
    fn words(&self) -> Result<Option<[usize; 2]>> {
        self.text.as_ref().map(|ids| ids.input_ids.dims2().map(<[usize; 2]>::from)).transpose()
    }
}

/// The pictures of a codebook, which are halved three times.
fn codebook_pixels<'a>(cfg: &FlavaImageCodebookConfig, call: &'a Call) -> Result<&'a Tensor, SessionError> {
    let values = Inputs::forward(call, &["pixel_values"], &[])?.pictures("pixel_values", cfg.input_channels)?;
    let (_, _, height, width) = values.dims4()?;
    if height.min(width) < 8 {
        return Err(SessionError::input("pixel_values", format!("is {height} x {width} pixels, less than 8")));
    }
    Ok(values)
}

impl Session for FlavaModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let outputs = match &self.class {
            Class::Encoders { cfg, encoders, heads } => {
                let arguments = Arguments::read(cfg, heads.is_some(), call)?;
                match heads {
                    None => self.encode(encoders, &arguments, observer)?,
                    Some(heads) => self.predict(cfg, encoders, heads, &arguments, observer)?,
                }
            }
            Class::Codebook { cfg, codebook } => {
                let logits = codebook.forward(&self.pixels(codebook_pixels(cfg, call)?)?)?;
                Tensors::from([("logits".into(), logits)])
            }
        };
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let bytes = self.dtype.size_in_bytes() as u64;
        Ok(match &self.class {
            Class::Encoders { cfg, heads: None, .. } => model_cost(cfg, &Arguments::read(cfg, false, call)?, bytes)?,
            Class::Encoders { cfg, .. } => pretraining_cost(cfg, &Arguments::read(cfg, true, call)?, bytes)?,
            Class::Codebook { cfg, .. } => {
                let (batch, _, height, width) = codebook_pixels(cfg, call)?.dims4()?;
                forward_phase(ImageCodebook::cost(cfg, batch, [height, width], bytes))
            }
        })
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// FLOPs and bytes of one forward pass of `FlavaModel`.
fn model_cost(cfg: &FlavaConfig, arguments: &Arguments, bytes: u64) -> Result<Vec<PhaseCost>> {
    let (pictures, words) = (arguments.pictures()?, arguments.words()?);
    let image = pictures.map(|batch| Encoders::image_cost(cfg, batch, 1, bytes));
    let text = words.map(|shape| Encoders::text_cost(cfg, shape, 1, bytes));
    let joined = match (pictures, words) {
        (Some(batch), Some([_, words])) if arguments.joins_plain => Encoders::join_cost(cfg, batch, words, bytes),
        _ => Cost::default(),
    };
    Ok(towers(image, text, joined))
}

/// FLOPs and bytes of one forward pass of `FlavaForPreTraining`, what is masked and what is not.
fn pretraining_cost(cfg: &FlavaConfig, arguments: &Arguments, bytes: u64) -> Result<Vec<PhaseCost>> {
    let (pictures, words) = (arguments.pictures()?, arguments.words()?);
    let (images, texts) =
        (1 + usize::from(arguments.masked.is_some()), 1 + usize::from(arguments.masked_text.is_some()));
    let image = pictures.map(|batch| Encoders::image_cost(cfg, batch, images, bytes));
    let text = words.map(|shape| Encoders::text_cost(cfg, shape, texts, bytes));
    let when = |weight: f64, cost: Cost| if weight > 0.0 { cost } else { Cost::default() };
    let image_head =
        |rows| PredictionHead::cost(rows, cfg.image_config.hidden_size, cfg.image_config.vocab_size, bytes);
    let text_head = |rows| PredictionHead::cost(rows, cfg.text_config.hidden_size, cfg.text_config.vocab_size, bytes);
    let heads = match (pictures, words) {
        (Some(batch), Some([_, words])) => {
            let joined = Encoders::join_cost(cfg, batch, words, bytes);
            let seq = usize::from(cfg.multimodal_config.use_cls_token) + 1 + cfg.image_patches() + words;
            let items = batch as u64;
            let linear = |input: usize, output: usize| cost::linear(items, input as u64, output as u64, true, bytes);
            let unit = cost::elementwise(items * cfg.projection_dim as u64, UNIT_FLOPS as u64) * 2;
            let contrastive = linear(cfg.image_config.hidden_size, cfg.projection_dim)
                + linear(cfg.text_config.hidden_size, cfg.projection_dim)
                + unit
                + cost::elementwise(items * items, 2 * cfg.projection_dim as u64 + 1);
            joined * if arguments.joins_plain { 2 } else { 1 }
                + when(cfg.itm_weight, Pooler::cost(batch, cfg.hidden_size, bytes) + linear(cfg.hidden_size, 2))
                + when(cfg.mmm_image_weight, image_head(batch * mmm_image_rows(cfg, seq)[1]))
                + when(cfg.mmm_text_weight, text_head(batch * words))
                + when(cfg.global_contrastive_weight, contrastive)
        }
        (Some(batch), None) => when(cfg.mim_weight, image_head(batch * (1 + cfg.image_patches()))),
        (None, Some([batch, words])) => when(cfg.mlm_weight, text_head(batch * words)),
        (None, None) => Cost::default(),
    };
    Ok(towers(image, text, heads))
}

/// The towers that ran, as components before the rest.
fn towers(image: Option<Cost>, text: Option<Cost>, rest: Cost) -> Vec<PhaseCost> {
    let rest = match text {
        Some(text) => behind([(Phase::Text, text)], forward_phase(rest)),
        None => forward_phase(rest),
    };
    match image {
        Some(image) => behind([(Phase::Vision, image)], rest),
        None => rest,
    }
}

/// What a tower gave, whose end the observer is told where it ran.
fn announced<T>(states: Option<T>, tower: Phase, observer: &mut dyn Observer) -> Option<T> {
    states.inspect(|_| observer.end(tower))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(class: &str, changes: Value) -> ModelSpec {
        let encoder =
            json!({"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6});
        let part = |more: Value| {
            let mut part = encoder.clone();
            part.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
            part
        };
        let mut config = json!({
            "image_config": part(json!({"image_size": 4, "patch_size": 2, "num_channels": 1, "vocab_size": 5})),
            "text_config": part(json!({"vocab_size": 9, "max_position_embeddings": 6})),
            "multimodal_config": part(json!({})),
            "image_codebook_config": {"hidden_size": 4, "input_channels": 1, "vocab_size": 5, "num_blocks_per_group": 1},
            "hidden_size": 4,
            "projection_dim": 3,
        });
        for (field, value) in changes.as_object().expect("an object") {
            config[field] = value.clone();
        }
        ModelSpec::new("flava", class, config)
    }

    fn call(arguments: Value) -> Call {
        let zeros = |shape: &[usize], dtype: DType| Tensor::zeros(shape, dtype, &Device::Cpu).expect("zeros");
        let inputs = Tensors::from([
            ("pixel_values".into(), zeros(&[1, 1, 4, 4], DType::F32)),
            ("input_ids".into(), zeros(&[1, 2], DType::I64)),
        ]);
        Call { method: "forward".into(), inputs, arguments: arguments.as_object().expect("an object").clone() }
    }

    fn message(class: &str, changes: Value, call: &Call) -> String {
        let spec = spec(class, changes);
        let read = FlavaConfig::from_spec(&spec)
            .and_then(|cfg| Arguments::read(&cfg, class == "FlavaForPreTraining", call).map(drop));
        read.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let plain = call(json!({}));
        assert_eq!(message("FlavaModel", json!({}), &plain), "");
        for (changes, start) in [
            (json!({"text_config_dict": {}}), "config.json: `text_config_dict` = {} is not supported for flava"),
            (json!({"image_config": {"patch_size": 300}}), "config.json: `image_config.patch_size`: is larger than"),
            (
                json!({"multimodal_config": {"num_attention_heads": 7}}),
                "config.json: `multimodal_config.hidden_size`: 768 is not a multiple of",
            ),
            (json!({"image_codebook_config": {"hidden_size": 3}}), "config.json: `hidden_size`: 3 is less than 4"),
        ] {
            let found = message("FlavaModel", changes, &plain);
            assert!(found.starts_with(start), "{found}");
        }
        assert_eq!(
            message(
                "FlavaModel",
                json!({"text_config": null, "image_config": null}),
                &Call { inputs: [("input_ids".into(), plain.inputs["input_ids"].clone())].into(), ..plain.clone() }
            ),
            ""
        );

        let error = message("FlavaForPreTraining", json!({}), &plain);
        assert!(error.starts_with("input `return_loss`: true is not supported"), "{error}");
        let without = call(json!({"return_loss": false}));
        assert_eq!(message("FlavaForPreTraining", json!({}), &without), "");
        let error = message("FlavaForPreTraining", json!({"hidden_size": 6}), &without);
        assert!(error.starts_with("config.json: `multimodal_config.hidden_size`: 4 is not that of"), "{error}");
        let mut small = plain.clone();
        small
            .inputs
            .insert("pixel_values".into(), Tensor::zeros((1, 1, 4, 2), DType::F32, &Device::Cpu).expect("zeros"));
        assert!(message("FlavaModel", json!({}), &small).starts_with("input `pixel_values`: is 4 x 2 pixels"));
        small.inputs.clear();
        assert!(message("FlavaModel", json!({}), &small).starts_with("input `input_ids`: is missing, and so is"));
    }

    /// Four groups of one block, 4 channels to 32, over a picture of 8 x 8 pixels.
    #[test]
    fn cost_of_a_codebook_by_hand() {
        let cfg =
            FlavaConfig::from_spec(&spec("FlavaImageCodebook", json!({}))).expect("a config").image_codebook_config;
        let conv = |pixels: u64, input: u64, output: u64, taps: u64| pixels * output * (2 * input * taps + 1);
        // activation, three narrowing and one widening convolution with activations between, sum
        let block = |pixels: u64, input: u64, output: u64| {
            let inner = output / 4;
            let identity = if input == output { 0 } else { conv(pixels, input, output, 1) };
            pixels * input
                + conv(pixels, input, inner, 9)
                + 2 * conv(pixels, inner, inner, 9)
                + 3 * pixels * inner
                + conv(pixels, inner, output, 1)
                + pixels * output
                + identity
        };
        let expected = conv(64, 1, 4, 49)
            + block(64, 4, 4)
            + block(16, 4, 8)
            + block(4, 8, 16)
            + block(1, 16, 32)
            + 32
            + conv(1, 32, 5, 1);
        assert_eq!(ImageCodebook::cost(&cfg, 1, [8, 8], 4).flops, expected);
    }

    /// Of 241 M parameters the encoders' layers (30 of 7.09 M) are used for every row: 197 and 77, and 275 of both.
    #[test]
    fn cost_at_the_published_size() {
        let mut spec = spec("FlavaModel", json!({}));
        spec.config = json!({});
        let cfg = FlavaConfig::from_spec(&spec).expect("a config");
        let zeros = |shape: &[usize], dtype: DType| Tensor::zeros(shape, dtype, &Device::Cpu).expect("zeros");
        let inputs = Tensors::from([
            ("pixel_values".into(), zeros(&[1, 3, 224, 224], DType::F32)),
            ("input_ids".into(), zeros(&[1, 77], DType::I64)),
        ]);
        let call = Call { inputs, ..call(json!({})) };
        let arguments = Arguments::read(&cfg, false, &call).expect("a call");
        let phases = model_cost(&cfg, &arguments, 4).expect("a cost");
        let flops = phases.iter().map(|phase| phase.cost.flops).sum::<u64>() as f64;
        let attended = |rows: f64, layers: f64| layers * (24.0 * rows * 768.0 * 768.0 + 4.0 * rows * rows * 768.0);
        let products = attended(197.0, 12.0)
            + attended(77.0, 12.0)
            + attended(275.0, 6.0)
            + 2.0 * 768.0 * 768.0 * (196.0 + 274.0 + 3.0); // patches, projections, poolers
        assert!((flops / products - 1.0).abs() < 0.01, "{flops:e}, not {products:e}");
    }
}
