//! BERT encoder: learned positions, bidirectional attention, normalisation after each half of a layer.
//! Source: BERT (arXiv:1810.04805). Mirrors `transformers.BertModel`, `BertForMaskedLM` and
//! `BertForSequenceClassification`.

use std::collections::BTreeMap;

use candle_core::Tensor;
use candle_nn::VarBuilder;
use roofbench_core::classify::label_count;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, Norm, PhaseCost};
use roofbench_core::inputs::{Inputs, in_range, zero_or_one};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Mask, Rows};
use roofbench_nn::embedding::Embedding;
use roofbench_nn::kernels::isa;
use roofbench_nn::layer::{EncoderLayer, encode};
use roofbench_nn::linear::Linear;
use roofbench_nn::norm::LayerNorm;
use serde::Deserialize;
use serde_json::{Value, json};

use super::bert_layer::BertLayerConfig;

/// The classes that run.
pub const CLASSES: &[&str] = &["BertModel", "BertForMaskedLM", "BertForSequenceClassification"];

/// Names in published checkpoints. The first two are for a tied output matrix, the third for a class without pooler.
const RULES: &[AliasRule] = &[
    AliasRule::rename(
        r"^cls\.predictions\.decoder\.weight$",
        "bert.embeddings.word_embeddings.weight",
        AliasScope::Head,
    ),
    AliasRule::rename(r"^cls\.predictions\.decoder\.bias$", "cls.predictions.bias", AliasScope::Head),
    AliasRule::drop(r"^(bert\.)?pooler\.", AliasScope::Head),
    // converted from TensorFlow
    AliasRule::rename(r"LayerNorm\.gamma$", "LayerNorm.weight", AliasScope::Always),
    AliasRule::rename(r"LayerNorm\.beta$", "LayerNorm.bias", AliasScope::Always),
    // the head of next-sentence prediction, which none of the classes has
    AliasRule::drop(r"^cls\.seq_relationship\.", AliasScope::Always),
    // an integer buffer
    AliasRule::drop(r"\.position_ids$", AliasScope::Always),
    // saved from a class with a head, and from BertModel
    AliasRule::rename(r"^bert\.", "", AliasScope::Base),
    AliasRule::drop(r"^(cls|classifier)\.", AliasScope::Base),
    AliasRule::rename(r"^(embeddings|encoder|pooler)\.", "bert.$1.", AliasScope::Head),
];

/// How published checkpoints name the tensors of `spec`.
pub fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    let untied = spec.config.get("tie_word_embeddings") == Some(&Value::Bool(false));
    match spec.class.as_str() {
        "BertForMaskedLM" if untied => &RULES[2..],
        "BertForMaskedLM" => RULES,
        _ => &RULES[3..],
    }
}

/// The part of `config.json` that shapes the computation; field names are the file's own.
#[derive(Debug, Clone, Deserialize)]
pub struct BertConfig {
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
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Distinct segments.
    pub type_vocab_size: usize,
    /// Activation of the feed-forward half and of the masked-LM head.
    #[serde(default = "gelu")]
    pub hidden_act: Activation,
    /// Added to the variance in every normalisation.
    #[serde(default = "eps")]
    pub layer_norm_eps: f64,
    /// The masked-LM head multiplies with the word embeddings; `true` when absent.
    #[serde(default = "yes")]
    pub tie_word_embeddings: bool,
}

fn gelu() -> Activation {
    Activation::Gelu
}

fn eps() -> f64 {
    1e-12
}

fn yes() -> bool {
    true
}

impl BertConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is missing, malformed, or changes the result in a way that isn't supported.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        let sizes = [
            ("vocab_size", cfg.vocab_size),
            ("hidden_size", cfg.hidden_size),
            ("num_hidden_layers", cfg.num_hidden_layers),
            ("num_attention_heads", cfg.num_attention_heads),
            ("intermediate_size", cfg.intermediate_size),
            ("max_position_embeddings", cfg.max_position_embeddings),
            ("type_vocab_size", cfg.type_vocab_size),
        ];
        config::sizes(&sizes)?;
        config::multiple(("hidden_size", cfg.hidden_size), ("num_attention_heads", cfg.num_attention_heads))?;
        config::not_negative(&[("layer_norm_eps", cfg.layer_norm_eps)])?;
        config::refuse_unless(spec, "position_embedding_type", &["absolute".into()])?;
        config::refuse_unless(spec, "is_decoder", &[false.into()])?;
        config::refuse_unless(spec, "add_cross_attention", &[false.into()])?;
        config::refuse_unless(spec, "pruned_heads", &[json!({})])?;
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
}

/// Words, positions and segments, and the norm of their sum.
pub struct Embeddings {
    /// The table of words, which a head may be tied to.
    pub word_embeddings: Embedding,
    position_embeddings: Embedding,
    token_type_embeddings: Embedding,
    layer_norm: LayerNorm,
}

impl Embeddings {
    /// Reads the tables and `LayerNorm` under `vb`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(cfg: &BertConfig, vb: VarBuilder) -> Result<Self> {
        let table = |rows: usize, name: &str| Embedding::load(rows, cfg.hidden_size, vb.pp(name));
        Ok(Self {
            word_embeddings: table(cfg.vocab_size, "word_embeddings")?,
            position_embeddings: table(cfg.max_position_embeddings, "position_embeddings")?,
            token_type_embeddings: table(cfg.type_vocab_size, "token_type_embeddings")?,
            layer_norm: LayerNorm::load(cfg.hidden_size, cfg.layer_norm_eps, vb.pp("LayerNorm"))?,
        })
    }

    /// # Shapes
    /// (batch, seq) ids → (batch, seq, hidden).
    ///
    /// # Errors
    /// When an id is beyond its table.
    pub fn forward(&self, ids: &TokenIds) -> Result<Tensor> {
        self.layer_norm.forward(&self.sum(ids)?)
    }

    /// The same with `more` (batch, seq, hidden) in the sum.
    ///
    /// # Errors
    /// As there, and when the shape is another.
    pub fn forward_add(&self, ids: &TokenIds, more: &Tensor) -> Result<Tensor> {
        roofbench_nn::cost::elementwise(more.elem_count(), 1);
        self.layer_norm.forward(&(self.sum(ids)? + more)?)
    }

    fn sum(&self, ids: &TokenIds) -> Result<Tensor> {
        let words = self.word_embeddings.forward(&ids.input_ids)?; // (batch, seq, hidden)
        let positions = self.position_embeddings.forward(&ids.position_ids)?; // (1 or batch, seq, hidden)
        let types = self.token_type_embeddings.forward(&ids.token_type_ids)?; // (1 or batch, 1 or seq, hidden)
        roofbench_nn::cost::elementwise(words.elem_count(), 2);
        words.broadcast_add(&positions.broadcast_add(&types)?)
    }

    /// FLOPs and bytes over (batch, seq) tokens; the ids are a few bytes per token, and left out.
    pub fn cost(cfg: &BertConfig, [batch, seq]: [usize; 2], bytes: u64) -> Cost {
        let (tokens, hidden) = ((batch * seq) as u64, cfg.hidden_size as u64);
        // words, positions and segments looked up, two additions, the norm
        cost::embedding(tokens, hidden, bytes) * 3
            + cost::elementwise(tokens * hidden, 2)
            + cost::norm(Norm::Layer, tokens, hidden, bytes)
    }
}

/// The layers, one after the other.
pub struct Encoder {
    layers: Vec<EncoderLayer>,
}

impl Encoder {
    /// Reads `layer.0` and so on under `vb`. `some_rows`: of the last layer some rows alone will be wanted.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(cfg: &BertConfig, some_rows: bool, vb: VarBuilder) -> Result<Self> {
        let last = cfg.num_hidden_layers - 1;
        let layer = |i: usize| cfg.layer().encoder_layer(some_rows && i == last, vb.pp(format!("layer.{i}")));
        Ok(Self { layers: (0..cfg.num_hidden_layers).map(layer).collect::<Result<_>>()? })
    }

    /// The wanted rows of the last layer.
    ///
    /// # Shapes
    /// (batch, seq, hidden) → (batch, rows, hidden).
    ///
    /// # Errors
    /// When shapes do not fit together.
    pub fn forward(&self, x: Tensor, rows: &Rows, mask: Option<&Mask>) -> Result<Tensor> {
        encode(&self.layers, x, rows, mask)
    }

    /// FLOPs and bytes over (batch, seq) rows, all of them attended to, of which the last layer gives `wanted` an item.
    pub fn cost(cfg: &BertConfig, shape: [usize; 2], wanted: usize, bytes: u64) -> Cost {
        let shape = shape.map(|size| size as u64);
        cfg.layer().cost(bytes).encoder_of(cfg.num_hidden_layers, shape, wanted as u64)
    }
}

/// The first row through a dense layer and tanh.
pub struct Pooler {
    dense: Linear,
}

impl Pooler {
    /// Reads `dense` under `vb`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(hidden: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self { dense: Linear::load(hidden, hidden, true, vb.pp("dense"))? })
    }

    /// Reads the same for a class that holds it and makes nothing of it.
    ///
    /// # Errors
    /// As there.
    pub fn skip(hidden: usize, vb: VarBuilder) -> Result<()> {
        vb.get((hidden, hidden), "dense.weight")?;
        vb.get(hidden, "dense.bias").map(drop)
    }

    /// # Shapes
    /// (batch, seq, hidden) → (batch, hidden).
    ///
    /// # Errors
    /// When the width is another.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.dense.forward_act(&x.narrow(1, 0, 1)?.squeeze(1)?, Activation::Tanh)
    }

    /// FLOPs and bytes for `batch` items.
    pub fn cost(batch: usize, hidden: usize, bytes: u64) -> Cost {
        let [batch, hidden] = [batch, hidden].map(|size| size as u64);
        cost::linear(batch, hidden, hidden, true, bytes) + cost::elementwise(batch * hidden, 1)
    }
}

/// Scores of every word for each row: dense layer, activation, norm, and a matrix that may be that of the words.
pub struct PredictionHead {
    dense: Linear,
    hidden_act: Activation,
    layer_norm: LayerNorm,
    decoder: Linear,
}

impl PredictionHead {
    /// Reads `dense` and `LayerNorm` under `vb`, for rows as wide as `decoder` takes.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(hidden_act: Activation, eps: f64, decoder: Linear, vb: VarBuilder) -> Result<Self> {
        let hidden = decoder.in_dim();
        Ok(Self {
            dense: Linear::load(hidden, hidden, true, vb.pp("dense"))?,
            hidden_act,
            layer_norm: LayerNorm::load(hidden, eps, vb.pp("LayerNorm"))?,
            decoder,
        })
    }

    /// # Shapes
    /// (..., hidden) → (..., vocab).
    ///
    /// # Errors
    /// When the width is another.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.decoder.forward(&self.layer_norm.forward(&self.dense.forward_act(x, self.hidden_act)?)?)
    }

    /// FLOPs and bytes for `rows` rows.
    pub fn cost(rows: usize, hidden: usize, vocab: usize, bytes: u64) -> Cost {
        let [rows, hidden, vocab] = [rows, hidden, vocab].map(|size| size as u64);
        cost::linear(rows, hidden, hidden, true, bytes)
            + cost::elementwise(rows * hidden, 1)
            + cost::norm(Norm::Layer, rows, hidden, bytes)
            + cost::linear(rows, hidden, vocab, true, bytes)
    }
}

/// What follows the encoder.
#[derive(Debug, Clone, Copy)]
pub(crate) enum HeadKind {
    /// Of `BertModel`.
    Pooler,
    /// Of `BertForMaskedLM`.
    MaskedLm,
    /// Of `BertForSequenceClassification`, with its number of labels.
    Classifier { labels: usize },
}

impl HeadKind {
    pub(crate) fn of(spec: &ModelSpec) -> Result<Self, SessionError> {
        match spec.class.as_str() {
            "BertModel" => Ok(Self::Pooler),
            "BertForMaskedLM" => Ok(Self::MaskedLm),
            "BertForSequenceClassification" => Ok(Self::Classifier { labels: label_count(&spec.config)? }),
            _ => Err(config::unsupported_class(spec, CLASSES)),
        }
    }
}

/// The layers of a [`HeadKind`].
enum Head {
    Pooler(Pooler),
    MaskedLm(PredictionHead),
    /// Scores of every class from the pooled state.
    Classifier {
        pooler: Pooler,
        classifier: Linear,
    },
}

impl Head {
    /// `vb` is the checkpoint's root, `bert` the encoder's part of it, `words` the embeddings that a head may be tied to.
    fn load(kind: HeadKind, cfg: &BertConfig, vb: VarBuilder, bert: VarBuilder, words: &Embedding) -> Result<Self> {
        let pooler = || Pooler::load(cfg.hidden_size, bert.pp("pooler"));
        Ok(match kind {
            HeadKind::Pooler => Self::Pooler(pooler()?),
            HeadKind::Classifier { labels } => Self::Classifier {
                pooler: pooler()?,
                classifier: Linear::load(cfg.hidden_size, labels, true, vb.pp("classifier"))?,
            },
            HeadKind::MaskedLm => Self::MaskedLm(masked_lm_head(cfg, vb.pp("cls.predictions"), words)?),
        })
    }

    /// Output fields of the class from the encoder's result (batch, seq, hidden).
    fn forward(&self, hidden: Tensor) -> Result<Tensors> {
        Ok(match self {
            Self::Pooler(pooler) => {
                let pooled = pooler.forward(&hidden)?; // (batch, hidden)
                Tensors::from([("last_hidden_state".into(), hidden), ("pooler_output".into(), pooled)])
            }
            Self::MaskedLm(head) => Tensors::from([("logits".into(), head.forward(&hidden)?)]), // (batch, seq, vocab)
            Self::Classifier { pooler, classifier } => {
                Tensors::from([("logits".into(), classifier.forward(&pooler.forward(&hidden)?)?)]) // (batch, labels)
            }
        })
    }
}

/// Reads the head of masked words under `vb`, tied to `words` or not as the config says.
///
/// # Errors
/// When a tensor is missing or has another shape.
pub fn masked_lm_head(cfg: &BertConfig, vb: VarBuilder, words: &Embedding) -> Result<PredictionHead> {
    let bias = vb.get(cfg.vocab_size, "bias")?;
    let decoder = if cfg.tie_word_embeddings {
        words.output(Some(&bias))?
    } else {
        // such a checkpoint has `bias` as well, but the class adds the decoder's own
        Linear::load(cfg.hidden_size, cfg.vocab_size, true, vb.pp("decoder"))?
    };
    PredictionHead::load(cfg.hidden_act, cfg.layer_norm_eps, decoder, vb.pp("transform"))
}

/// The encoder with the head of its class.
pub struct BertModel {
    cfg: BertConfig,
    embeddings: Embeddings,
    encoder: Encoder,
    head: Head,
    kind: HeadKind,
    bytes_per_element: u64,
    paths: BTreeMap<String, String>,
}

impl BertModel {
    /// Loads the class of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// Names the config field or the tensor at fault, or the class when it is none of [`CLASSES`].
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let (kind, cfg) = (HeadKind::of(spec)?, BertConfig::from_spec(spec)?);
        let bert = match kind {
            HeadKind::Pooler => vb.clone(),
            HeadKind::MaskedLm | HeadKind::Classifier { .. } => vb.pp("bert"),
        };
        let embeddings = Embeddings::load(&cfg, bert.pp("embeddings"))?;
        let encoder = Encoder::load(&cfg, false, bert.pp("encoder"))?;
        let head = Head::load(kind, &cfg, vb, bert.clone(), &embeddings.word_embeddings)?;
        let bytes_per_element = spec.dtype.size_in_bytes() as u64;
        Ok(Self {
            cfg,
            embeddings,
            encoder,
            head,
            kind,
            bytes_per_element,
            paths: isa::paths(&spec.device, spec.dtype),
        })
    }

    fn forward(&self, ids: &TokenIds) -> Result<Tensors> {
        let mask = ids.attention_mask.as_ref().map(Mask::padding).transpose()?.flatten();
        let x = self.embeddings.forward(ids)?;
        self.head.forward(self.encoder.forward(x, &Rows::All, mask.as_ref())?)
    }
}

/// The tensor arguments of `forward`, checked; those that the call leaves out are filled in as the class does.
pub struct TokenIds {
    /// (batch, seq)
    pub input_ids: Tensor,
    /// (batch, seq) of 0 and 1
    pub attention_mask: Option<Tensor>,
    /// (batch, seq), or (1, 1) when all tokens are of segment 0
    pub token_type_ids: Tensor,
    /// (batch, seq), or (1, seq) when they count from 0
    pub position_ids: Tensor,
}

impl TokenIds {
    pub(crate) fn read(cfg: &BertConfig, call: &Call) -> Result<Self, SessionError> {
        let known = ["input_ids", "attention_mask", "token_type_ids", "position_ids"];
        Self::of(cfg, &Inputs::forward(call, &known, &[])?, "input_ids")
    }

    /// The input `name` and what goes with it: `attention_mask`, `token_type_ids` and `position_ids`.
    ///
    /// # Errors
    /// Names the input that is missing, misshapen, or beyond its table.
    pub fn of(cfg: &BertConfig, inputs: &Inputs, name: &str) -> Result<Self, SessionError> {
        let input_ids = inputs.matrix(name)?;
        in_range(name, &input_ids, "vocab_size", cfg.vocab_size)?;
        let like = |other: &str| inputs.matrix_as(other, (name, &input_ids));

        let (seq, limit) = (input_ids.dim(1)?, cfg.max_position_embeddings);
        let position_ids = match like("position_ids")? {
            Some(ids) => {
                in_range("position_ids", &ids, "max_position_embeddings", limit)?;
                ids
            }
            None if seq > limit => {
                let reason =
                    format!("a sequence of {seq} is longer than max_position_embeddings = {limit}; truncate it");
                return Err(SessionError::input(name, reason));
            }
            None => Tensor::arange(0, seq as i64, input_ids.device())?.unsqueeze(0)?,
        };
        let token_type_ids = match like("token_type_ids")? {
            Some(ids) => {
                in_range("token_type_ids", &ids, "type_vocab_size", cfg.type_vocab_size)?;
                ids
            }
            None => Tensor::zeros((1, 1), input_ids.dtype(), input_ids.device())?,
        };
        let attention_mask = like("attention_mask")?;
        if let Some(mask) = &attention_mask {
            zero_or_one("attention_mask", mask)?;
        }
        Ok(Self { input_ids, attention_mask, token_type_ids, position_ids })
    }
}

impl Session for BertModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let outputs = self.forward(&TokenIds::read(&self.cfg, call)?)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let (batch, seq) = TokenIds::read(&self.cfg, call)?.input_ids.dims2()?;
        let cost = forward_cost(&self.cfg, Some(self.kind), [batch, seq], self.bytes_per_element);
        Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }])
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// FLOPs and bytes of one forward pass over (batch, seq) tokens, all of them attended to.
pub(crate) fn forward_cost(cfg: &BertConfig, head: Option<HeadKind>, shape: [usize; 2], bytes: u64) -> Cost {
    let [batch, seq] = shape;
    let pooler = || Pooler::cost(batch, cfg.hidden_size, bytes);
    let head = match head {
        None => Cost::default(),
        Some(HeadKind::Pooler) => pooler(),
        Some(HeadKind::Classifier { labels }) => {
            pooler() + cost::linear(batch as u64, cfg.hidden_size as u64, labels as u64, true, bytes)
        }
        Some(HeadKind::MaskedLm) => PredictionHead::cost(batch * seq, cfg.hidden_size, cfg.vocab_size, bytes),
    };
    Embeddings::cost(cfg, shape, bytes) + Encoder::cost(cfg, shape, shape[1], bytes) + head
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(class: &str, changes: &[(&str, Value)]) -> ModelSpec {
        let mut config = json!({
            "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
            "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2,
        });
        for (field, value) in changes {
            config[*field] = value.clone();
        }
        ModelSpec::new("bert", class, config)
    }

    fn message(field: &str, value: Value) -> String {
        BertConfig::from_spec(&spec("BertModel", &[(field, value)])).err().map(|e| e.to_string()).unwrap_or_default()
    }

    #[test]
    fn configs_that_would_give_another_result_are_refused_by_name() {
        for (field, value, supported) in [
            ("position_embedding_type", json!("relative_key"), "absolute"),
            ("is_decoder", json!(true), "false"),
            ("add_cross_attention", json!(true), "false"),
            ("pruned_heads", json!({"1": [0]}), "{}"),
        ] {
            let expected =
                format!("config.json: `{field}` = {value} is not supported for bert; supported: {supported}");
            assert_eq!(message(field, value), expected);
        }
        assert_eq!(message("position_embedding_type", json!("absolute")), "");
    }

    #[test]
    fn malformed_configs_name_the_field() {
        assert!(message("hidden_size", Value::Null).starts_with("config.json: `hidden_size`: invalid type: null"));
        assert!(message("num_attention_heads", json!(7)).contains("`hidden_size`: 768 is not a multiple of"));
        assert!(message("num_hidden_layers", json!(0)).contains("`num_hidden_layers`: 0 is not in 1..="));
        assert!(message("vocab_size", json!(u64::MAX)).contains("`vocab_size`: 18446744073709551615 is not in 1..="));
        assert!(
            message("layer_norm_eps", json!(-1e-5)).contains("`layer_norm_eps`: -0.00001 is not a number of 0 or more")
        );
        let error = message("hidden_act", json!("maxout"));
        assert!(error.contains("`hidden_act`") && error.contains("maxout") && error.contains("gelu_new"), "{error}");
        let mut without = spec("BertModel", &[]);
        without.config.as_object_mut().unwrap().remove("intermediate_size");
        let error = BertConfig::from_spec(&without).unwrap_err().to_string();
        assert!(error.contains("missing field `intermediate_size`"), "{error}");
    }

    #[test]
    fn labels_come_from_either_field() {
        let labels =
            |changes: &[(&str, Value)]| match HeadKind::of(&spec("BertForSequenceClassification", changes)).unwrap() {
                HeadKind::Classifier { labels } => labels,
                other => panic!("{other:?}"),
            };
        assert_eq!(labels(&[]), 2);
        assert_eq!(labels(&[("num_labels", json!(3))]), 3);
        assert_eq!(labels(&[("id2label", json!({"0": "a", "1": "b", "2": "c", "3": "d"}))]), 4);
    }

    #[test]
    fn other_classes_are_refused() {
        let error = HeadKind::of(&spec("BertForQuestionAnswering", &[])).unwrap_err().to_string();
        assert!(error.contains("`BertForQuestionAnswering`") && error.contains("BertForMaskedLM"), "{error}");
    }

    /// One layer, hidden 4 in 2 heads, intermediate 6, vocabulary 10; a batch of 2 with 3 tokens each: 6 tokens.
    #[test]
    fn cost_by_hand() {
        let sizes = [
            ("vocab_size", 10),
            ("hidden_size", 4),
            ("num_hidden_layers", 1),
            ("num_attention_heads", 2),
            ("intermediate_size", 6),
        ];
        let cfg = BertConfig::from_spec(&spec("BertModel", &sizes.map(|(field, size)| (field, json!(size))))).unwrap();
        let encoder = forward_cost(&cfg, None, [2, 3], 4);
        let flops = 2 * 24 + 7 * 24 // embeddings: two additions and the norm over 6 * 4 elements
            + 2 * 6 * 4 * 12 + 6 * 12 // query, key, value
            + 2 * 2 * (2 * 2 * 9 * 2) + 5 * 2 * 2 * 9 // two products of width 2 and softmax: 2 items, 2 heads, 9 pairs
            + 2 * 6 * 4 * 4 + 6 * 4 + 24 + 7 * 24 // output, residual, norm
            + 2 * 6 * 4 * 6 + 6 * 6 + 36 // intermediate and its activation
            + 2 * 6 * 6 * 4 + 6 * 4 + 24 + 7 * 24; // output, residual, norm
        assert_eq!(encoder.flops, flops);
        let weights = 3 * 24 + 8 + (4 + 1) * 12 + (4 + 1) * 4 + 8 + (4 + 1) * 6 + (6 + 1) * 4 + 8;
        assert_eq!(encoder.weight_bytes, 4 * weights);
        // what each operation writes: 3 lookups and a norm; qkv, context, output and norm; intermediate, output and norm
        assert_eq!(encoder.activation_bytes, 4 * 6 * (4 * 4 + (12 + 4 + 4 + 4) + (6 + 4 + 4)));
        assert_eq!(encoder.kv_bytes, 0);

        let of = |head| forward_cost(&cfg, Some(head), [2, 3], 4);
        assert_eq!(of(HeadKind::Pooler).flops - flops, 2 * 2 * 16 + 8 + 8); // 2 rows
        assert_eq!(of(HeadKind::Classifier { labels: 2 }).flops - of(HeadKind::Pooler).flops, 2 * 2 * 4 * 2 + 2 * 2);
        let head = 2 * 6 * 16 + 24 + 24 + 7 * 24 + 2 * 6 * 4 * 10 + 6 * 10; // dense, activation, norm, decoder
        assert_eq!(of(HeadKind::MaskedLm).flops - flops, head);
    }

    /// Published for `BertModel` at BERT-base size and 128 tokens: 22.36 GFLOPs (calflops, README, module hooks), and
    /// 22.5 (TinyBERT, arXiv:1909.10351, table 1). The products alone are
    /// 12 layers · (24·128·768² + 4·128²·768) + the pooler's 2·768² = 22.35 G; counters differ in the rest.
    #[test]
    fn cost_of_bert_base_matches_published_counts() {
        let cfg = BertConfig::from_spec(&spec("BertModel", &[])).unwrap();
        let flops = |head| forward_cost(&cfg, Some(head), [1, 128], 4).flops as f64;
        let encoder = flops(HeadKind::Pooler);
        assert!((encoder / 22.36e9 - 1.0).abs() < 0.003, "{encoder:e}");
        assert!((encoder / 22.5e9 - 1.0).abs() < 0.006, "{encoder:e}");
        // the masked-LM head adds 2·128·(768² + 768·30522) and takes the pooler away
        let head = flops(HeadKind::MaskedLm) - encoder;
        assert!((head / (2. * 128. * (768. * 768. + 768. * 30522.)) - 1.0).abs() < 0.002, "{head:e}");
    }

    #[test]
    fn alias_rules_depend_on_class_and_tying() {
        let patterns = |spec: ModelSpec| aliases(&spec).iter().map(|rule| rule.pattern).collect::<Vec<_>>();
        let tied = patterns(spec("BertForMaskedLM", &[]));
        let untied = patterns(spec("BertForMaskedLM", &[("tie_word_embeddings", json!(false))]));
        let classifier = patterns(spec("BertForSequenceClassification", &[]));
        assert!(tied.iter().any(|pattern| pattern.contains("decoder")));
        assert!(!untied.iter().any(|pattern| pattern.contains("decoder")));
        assert!(untied[0].ends_with(r"pooler\."));
        assert!(!classifier.iter().any(|pattern| pattern.ends_with(r"?pooler\.")));
    }
}
