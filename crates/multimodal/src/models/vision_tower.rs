//! The vision towers of CLIP, of BLIP and of BLIP-2: a vision transformer whose states another part reads, of whichever
//! layer. CLIP's normalises its embeddings as well; the others hold query, key and value as one matrix.
//! Sources: CLIP (arXiv:2103.00020), BLIP (arXiv:2201.12086), BLIP-2 (arXiv:2301.12597). Mirrors
//! `transformers.CLIPVisionModel`, `BlipVisionModel` and `Blip2VisionModel`.

use candle_core::Tensor;
use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, Norm};
use roofbench_core::inputs::Inputs;
use roofbench_core::session::{ModelSpec, Result, SessionError};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Pattern, Rows};
use roofbench_nn::layer::{EncoderLayer, encode};
use roofbench_nn::norm::LayerNorm;
use roofbench_nn::patch_embed::PatchEmbed;
use roofbench_nn::resize;
use roofbench_vision::models::activation_dtype;
use serde::Deserialize;
use serde_json::Value;

use super::distinct::Distinct;
use super::encoder_layer::{EncoderLayerConfig, Projections};

/// Whose tower it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Form {
    /// `pre_layrnorm` behind the embeddings, patches without biases, `q_proj`, `k_proj`, `v_proj`.
    #[default]
    Clip,
    /// No such norm, patches with biases, `qkv`.
    Blip,
    /// The same with other sizes where config.json leaves them out, and `qkv_bias`.
    Blip2,
}

impl Form {
    /// What the class of this form has for fields that config.json leaves out.
    fn defaults(self) -> Vec<(&'static str, Value)> {
        let (sizes, image_size, patch_size, hidden_act, layer_norm_eps) = match self {
            Self::Clip => ([768, 3072, 12, 12], 224, 32, "quick_gelu", 1e-5),
            Self::Blip => ([768, 3072, 12, 12], 384, 16, "gelu", 1e-5),
            Self::Blip2 => ([1408, 6144, 39, 16], 224, 14, "gelu", 1e-6),
        };
        let names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"];
        let mut defaults: Vec<_> = names.into_iter().zip(sizes.map(Value::from)).collect();
        defaults.extend([
            ("image_size", image_size.into()),
            ("patch_size", patch_size.into()),
            ("hidden_act", hidden_act.into()),
            ("layer_norm_eps", layer_norm_eps.into()),
        ]);
        defaults
    }
}

/// The part of a tower's config that shapes the computation; field names are the file's own.
#[derive(Debug, Clone, Deserialize)]
pub struct VisionTowerConfig {
    /// Width of the stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward half.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads; they divide `hidden_size`.
    pub num_attention_heads: usize,
    /// Colour channels; CLIP's alone may be others than 3.
    #[serde(default = "three")]
    pub num_channels: usize,
    /// Height and width of the pictures that the positions were learned on.
    pub image_size: usize,
    /// Height and width of a patch; what remains beyond whole patches is left out.
    pub patch_size: usize,
    /// Activation of the feed-forward half.
    pub hidden_act: Activation,
    /// Added to the variance in every normalisation.
    pub layer_norm_eps: f64,
    /// The products of query, key and value have biases; BLIP-2's alone may have none.
    #[serde(default = "yes")]
    pub qkv_bias: bool,
    /// Whose tower it is; no field of the file.
    #[serde(skip)]
    pub form: Form,
}

fn three() -> usize {
    3
}

fn yes() -> bool {
    true
}

impl VisionTowerConfig {
    /// Reads and checks the config of a tower, which is all of `spec`: see [`config::nested`] for one in another.
    ///
    /// # Errors
    /// Names the field that is malformed, contradicts another, or changes the result in a way that isn't supported.
    pub fn from_spec(spec: &ModelSpec, form: Form) -> Result<Self, SessionError> {
        let cfg = Self { form, ..config::with_defaults(spec, &form.defaults()).parse_config()? };
        config::sizes(&[
            ("hidden_size", cfg.hidden_size),
            ("intermediate_size", cfg.intermediate_size),
            ("num_hidden_layers", cfg.num_hidden_layers),
            ("num_attention_heads", cfg.num_attention_heads),
            ("num_channels", cfg.num_channels),
            ("image_size", cfg.image_size),
            ("patch_size", cfg.patch_size),
        ])?;
        config::multiple(("hidden_size", cfg.hidden_size), ("num_attention_heads", cfg.num_attention_heads))?;
        config::not_negative(&[("layer_norm_eps", cfg.layer_norm_eps)])?;
        if form != Form::Clip {
            config::refuse_unless(spec, "num_channels", &[3.into()])?;
        }
        if form != Form::Blip2 {
            config::refuse_unless(spec, "qkv_bias", &[true.into()])?;
        }
        if cfg.learned() == 0 {
            return Err(config::invalid("patch_size", "is larger than image_size"));
        }
        Ok(cfg)
    }

    /// Rows, and columns, of the patches that the positions were learned on.
    fn learned(&self) -> usize {
        self.image_size / self.patch_size
    }

    fn layer(&self) -> EncoderLayerConfig {
        EncoderLayerConfig {
            hidden_size: self.hidden_size,
            num_attention_heads: self.num_attention_heads,
            intermediate_size: self.intermediate_size,
            hidden_act: self.hidden_act,
            layer_norm_eps: self.layer_norm_eps,
            projections: match self.form {
                Form::Clip => Projections::Separate,
                Form::Blip | Form::Blip2 => Projections::Fused { bias: self.qkv_bias },
            },
            pattern: Pattern::Full,
        }
    }

    fn norm(&self, vb: VarBuilder) -> Result<LayerNorm> {
        LayerNorm::load(self.hidden_size, self.layer_norm_eps, vb)
    }

    /// FLOPs and bytes of the states behind the first `layers` layers, of the last of which all rows are used, or so many
    /// first ones.
    pub fn cost(&self, pixels: &Pixels, layers: usize, rows: Option<usize>, bytes: u64) -> Cost {
        let (batch, tokens) = (pixels.distinct.count() as u64, pixels.shape()[1]);
        let (patches, hidden) = (tokens - 1, self.hidden_size as u64);
        let [channels, patch, learned] = [self.num_channels, self.patch_size, self.learned()].map(|size| size as u64);
        let projection = cost::Conv2d {
            batch,
            in_channels: channels,
            out_channels: hidden,
            kernel: [patch; 2],
            groups: 1,
            output: pixels.grid.map(|n| n as u64),
            bias: self.form != Form::Clip,
        };
        let interpolation = match pixels.interpolated {
            true => {
                let to = (pixels.grid[0], pixels.grid[1]);
                let neighbours = resize::bicubic_neighbours((self.learned(), self.learned()), to, false) as u64;
                cost::elementwise(neighbours * hidden, 2) // a multiply-add for each
            }
            false => Cost::default(),
        };
        let embeddings = cost::input(pixels.distinct.values().elem_count() as u64, bytes)
            + projection.cost(bytes)
            + cost::elementwise(batch * patches * hidden, 1) // positions added
            + interpolation
            // the class token with its position, and every learned position, once; a row an item for the former
            + Cost { weight_bytes: (1 + learned * learned) * hidden * bytes, ..Cost::default() }
            + Cost { activation_bytes: batch * hidden * bytes, ..Cost::default() };
        let pre_norm = match self.form {
            Form::Clip => self.norm_cost(batch * tokens, bytes),
            Form::Blip | Form::Blip2 => Cost::default(),
        };
        let wanted = rows.map_or(tokens, |rows| rows as u64);
        embeddings + pre_norm + self.layer().cost(bytes).encoder_of(layers, [batch, tokens], wanted)
    }

    /// FLOPs and bytes of `post_layernorm` over `rows` rows.
    pub fn norm_cost(&self, rows: u64, bytes: u64) -> Cost {
        cost::norm(Norm::Layer, rows, self.hidden_size as u64, bytes)
    }
}

/// The pictures of a call, checked.
pub struct Pixels<'a> {
    /// (batch, channels, height, width)
    values: &'a Tensor,
    /// Those that the tower sees.
    distinct: Distinct,
    /// Rows and columns of their patches.
    grid: [usize; 2],
    /// The positions are to be interpolated to these.
    interpolated: bool,
}

impl<'a> Pixels<'a> {
    /// Reads `pixel_values` and `interpolate_pos_encoding`.
    ///
    /// # Errors
    /// Names the argument that is missing or does not fit the tower.
    pub fn read(cfg: &VisionTowerConfig, inputs: &Inputs<'a>) -> Result<Self, SessionError> {
        let values = inputs.pictures("pixel_values", cfg.num_channels)?;
        Self::new(cfg, values, inputs.flag("interpolate_pos_encoding")?)
    }

    /// Pictures (batch, channels, height, width), whose sizes are others than those of the tower where the positions are
    /// interpolated alone.
    ///
    /// # Errors
    /// Names the argument that does not fit the tower.
    pub fn new(cfg: &VisionTowerConfig, values: &'a Tensor, interpolate: bool) -> Result<Self, SessionError> {
        let (_, _, height, width) = values.dims4()?;
        let (side, grid) = (cfg.image_size, [height / cfg.patch_size, width / cfg.patch_size]);
        if !interpolate && [height, width] != [side; 2] {
            let reason = format!(
                "is {height} x {width} pixels, image_size is {side} x {side}; resize the pictures, or set \
                 interpolate_pos_encoding to true"
            );
            return Err(SessionError::input("pixel_values", reason));
        }
        if grid.contains(&0) {
            let reason = format!("{height} x {width} pixels are smaller than a patch");
            return Err(SessionError::input("pixel_values", reason));
        }
        // where rows and columns stay, interpolation changes nothing
        Ok(Self { values, distinct: Distinct::of(values)?, grid, interpolated: grid != [cfg.learned(); 2] })
    }

    /// (batch, channels, height, width).
    pub fn values(&self) -> &Tensor {
        self.values
    }

    /// Pictures, and tokens of each: its patches behind the class token.
    pub fn shape(&self) -> [u64; 2] {
        [self.values.dims()[0], 1 + self.grid[0] * self.grid[1]].map(|size| size as u64)
    }
}

/// The tower.
pub struct VisionTower {
    cfg: VisionTowerConfig,
    patch_embedding: PatchEmbed,
    class_row: Tensor, // (1, 1, hidden), the class token with its position
    positions: Tensor, // (rows, columns, hidden), of the patches
    pre_layrnorm: Option<LayerNorm>,
    layers: Vec<EncoderLayer>,
    /// That are used behind the last layer.
    rows: Rows,
    post_layernorm: LayerNorm,
}

impl VisionTower {
    /// Reads the tower at `vb`, of whose last layer all rows are used, or so many first ones.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(cfg: &VisionTowerConfig, rows: Option<usize>, vb: VarBuilder) -> Result<Self> {
        let (hidden, learned, embeddings) = (cfg.hidden_size, cfg.learned(), vb.pp("embeddings"));
        let places = 1 + learned * learned;
        let clip = cfg.form == Form::Clip;
        let (class, positions) = match cfg.form {
            Form::Clip => {
                let class = embeddings.get(hidden, "class_embedding")?.unsqueeze(0)?;
                (class, embeddings.pp("position_embedding").get((places, hidden), "weight")?)
            }
            Form::Blip | Form::Blip2 => {
                let class = embeddings.get((1, 1, hidden), "class_embedding")?.squeeze(0)?;
                (class, embeddings.get((1, places, hidden), "position_embedding")?.squeeze(0)?)
            }
        };
        let dtype = activation_dtype(vb.dtype(), vb.device());
        let (class, positions) = (class.to_dtype(dtype)?, positions.to_dtype(dtype)?);
        let patch = (cfg.patch_size, cfg.patch_size);
        let last = cfg.num_hidden_layers - 1;
        let layer = |i: usize| cfg.layer().load(rows.is_some() && i == last, vb.pp("encoder.layers").pp(i));
        Ok(Self {
            cfg: cfg.clone(),
            patch_embedding: PatchEmbed::load(
                cfg.num_channels,
                hidden,
                patch,
                !clip,
                embeddings.pp("patch_embedding"),
            )?,
            class_row: (class + positions.narrow(0, 0, 1)?)?.unsqueeze(0)?,
            positions: positions.narrow(0, 1, places - 1)?.reshape((learned, learned, hidden))?,
            pre_layrnorm: clip.then(|| cfg.norm(vb.pp("pre_layrnorm"))).transpose()?,
            layers: (0..cfg.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            rows: rows.into(),
            post_layernorm: cfg.norm(vb.pp("post_layernorm"))?,
        })
    }

    /// What the first layer gets: patches with their positions behind the class token, in CLIP normalised.
    ///
    /// # Shapes
    /// (pictures that differ, 1 + patches, hidden).
    ///
    /// # Errors
    /// Candle's.
    fn embed(&self, pixels: &Pixels) -> Result<Tensor> {
        let (dtype, device) = (self.positions.dtype(), self.positions.device());
        let values = pixels.distinct.values().to_device(device)?.to_dtype(dtype)?;
        let (batch, hidden, [rows, columns]) = (values.dim(0)?, self.cfg.hidden_size, pixels.grid);
        let positions = match pixels.interpolated {
            true => resize::bicubic_grid(&self.positions, (rows, columns), false)?.to_dtype(dtype)?,
            false => self.positions.clone(),
        };
        let positions = positions.reshape((1, rows * columns, hidden))?;
        let positions = positions.broadcast_as((batch, rows * columns, hidden))?.contiguous()?;
        let patches = self.patch_embedding.forward_add(&values, &positions)?; // (batch, patches, hidden)
        let x = Tensor::cat(&[&self.class_row.broadcast_as((batch, 1, hidden))?, &patches], 1)?;
        match &self.pre_layrnorm {
            Some(norm) => norm.forward(&x),
            None => Ok(x),
        }
    }

    /// The stream behind the first `layers` layers, not normalised: what the library calls `hidden_states[layers]`.
    ///
    /// # Shapes
    /// (batch, 1 + patches, hidden); (batch, 1, hidden) behind the last layer where its first row alone is used.
    ///
    /// # Errors
    /// Candle's.
    pub fn hidden_state(&self, pixels: &Pixels, layers: usize) -> Result<Tensor> {
        let layers = &self.layers[..layers.min(self.layers.len())];
        let rows = if layers.len() == self.layers.len() { &self.rows } else { &Rows::All };
        pixels.distinct.spread(encode(layers, self.embed(pixels)?, rows, None)?)
    }

    /// The streams behind so many layers each, of one pass: see [`hidden_state`](Self::hidden_state).
    ///
    /// # Shapes
    /// (batch, 1 + patches, hidden) each.
    ///
    /// # Errors
    /// Candle's.
    pub fn hidden_states(&self, pixels: &Pixels, layers: &[usize]) -> Result<Vec<Tensor>> {
        let mut x = self.embed(pixels)?;
        let mut states = vec![x.clone(); layers.len()];
        for (i, layer) in self.layers.iter().take(layers.iter().copied().max().unwrap_or(0)).enumerate() {
            x = layer.forward(&x, &Rows::All, None)?;
            states.iter_mut().zip(layers).filter(|(_, wanted)| **wanted == i + 1).for_each(|(y, _)| *y = x.clone());
        }
        states.into_iter().map(|states| pixels.distinct.spread(states)).collect()
    }

    /// The stream behind the last layer, as [`hidden_state`](Self::hidden_state).
    ///
    /// # Shapes
    /// As there.
    ///
    /// # Errors
    /// Candle's.
    pub fn forward(&self, pixels: &Pixels) -> Result<Tensor> {
        self.hidden_state(pixels, self.layers.len())
    }

    /// The norm that stands behind the last layer: in CLIP of the class token alone.
    ///
    /// # Shapes
    /// (..., hidden) → (..., hidden).
    ///
    /// # Errors
    /// Candle's.
    pub fn post_layernorm(&self, x: &Tensor) -> Result<Tensor> {
        self.post_layernorm.forward(x)
    }

    /// The state of the class token alone, normalised.
    ///
    /// # Shapes
    /// (batch, any, hidden) → (batch, hidden).
    ///
    /// # Errors
    /// Candle's.
    pub fn pooled(&self, x: &Tensor) -> Result<Tensor> {
        self.post_layernorm.forward(&x.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?)
    }
}
