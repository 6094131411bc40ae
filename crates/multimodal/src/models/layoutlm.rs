//! LayoutLM: BERT over the words of a page, to whose embeddings those of their places are added.
//! Source: LayoutLM (arXiv:1912.13318). Mirrors `transformers.LayoutLMModel`, `LayoutLMForMaskedLM`,
//! `LayoutLMForSequenceClassification`, `LayoutLMForTokenClassification` and `LayoutLMForQuestionAnswering`. Version 3,
//! which sees the page itself, is in [`layoutlmv3`](super::layoutlmv3).

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::classify::label_count;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, PhaseCost};
use roofbench_core::inputs::{Inputs, in_range};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::Mask;
use roofbench_nn::embedding::Embedding;
use roofbench_nn::kernels::isa;
use roofbench_nn::linear::Linear;
use roofbench_text::models::bert::{self, BertConfig, Encoder, Pooler, PredictionHead, TokenIds};
use serde::Deserialize;
use serde_json::Value;

use super::layoutlmv3;

/// The classes that run, those of version 3 among them.
pub const CLASSES: &[&str] = &[
    "LayoutLMModel",
    "LayoutLMForMaskedLM",
    "LayoutLMForSequenceClassification",
    "LayoutLMForTokenClassification",
    "LayoutLMForQuestionAnswering",
    "LayoutLMv3Model",
    "LayoutLMv3ForSequenceClassification",
    "LayoutLMv3ForTokenClassification",
    "LayoutLMv3ForQuestionAnswering",
];

/// Names in published checkpoints. The first two are for a tied output matrix, the third for a class without that head.
const RULES: &[AliasRule] = &[
    AliasRule::rename(
        r"^cls\.predictions\.decoder\.weight$",
        "layoutlm.embeddings.word_embeddings.weight",
        AliasScope::Head,
    ),
    AliasRule::rename(r"^cls\.predictions\.decoder\.bias$", "cls.predictions.bias", AliasScope::Head),
    AliasRule::drop(r"^cls\.", AliasScope::Always),
    AliasRule::drop(r"^cls\.seq_relationship\.", AliasScope::Always),
    // integer buffers
    AliasRule::drop(r"(\.position_ids|(^|\.)visual_bbox)$", AliasScope::Always),
    // saved from a class with a head, and from the base model
    AliasRule::drop(r"^(classifier|qa_outputs)\.", AliasScope::Base),
    AliasRule::rename(r"^layoutlm(v3)?\.", "", AliasScope::Base),
    AliasRule::rename(r"^(embeddings|encoder|pooler)\.", "layoutlm.$1.", AliasScope::Head),
];

/// Those of version 3 that differ.
const RULES_V3: &[AliasRule] = &[
    RULES[4],
    RULES[5],
    RULES[6],
    AliasRule::rename(
        r"^(embeddings|encoder|patch_embed|cls_token|pos_embed|norm|LayerNorm)(\.|$)",
        "layoutlmv3.$1$2",
        AliasScope::Head,
    ),
];

/// Of `LayoutLMForMaskedLM` with an output matrix of its own.
const RULES_UNTIED: &[AliasRule] = &[RULES[3], RULES[4], RULES[7]];
/// Of the same with the words' matrix.
const RULES_TIED: &[AliasRule] = &[RULES[0], RULES[1], RULES[3], RULES[4], RULES[7]];

/// How published checkpoints name the tensors of `spec`.
pub fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    let untied = spec.config.get("tie_word_embeddings") == Some(&Value::Bool(false));
    match spec.class.as_str() {
        "LayoutLMForMaskedLM" if untied => RULES_UNTIED,
        "LayoutLMForMaskedLM" => RULES_TIED,
        class if class.starts_with("LayoutLMv3") => RULES_V3,
        _ => &RULES[2..],
    }
}

/// Loads the class of `spec`, of either version, from a checkpoint's root.
///
/// # Errors
/// Names the config field or the tensor at fault, or the class when it is none of [`CLASSES`].
pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Box<dyn Session>, SessionError> {
    match spec.class.starts_with("LayoutLMv3") {
        true => Ok(Box::new(layoutlmv3::LayoutLmV3Model::load(spec, vb)?)),
        false => Ok(Box::new(LayoutLmModel::load(spec, vb)?)),
    }
}

/// The part of `config.json` that shapes the computation; field names and defaults are the class's own.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct LayoutLmConfig {
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
    /// Activation of the feed-forward half and of the masked-LM head.
    pub hidden_act: Activation,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Distinct segments.
    pub type_vocab_size: usize,
    /// Added to the variance in every normalisation.
    pub layer_norm_eps: f64,
    /// Distinct coordinates of boxes, and distinct heights and widths.
    pub max_2d_position_embeddings: usize,
    /// The masked-LM head multiplies with the word embeddings.
    pub tie_word_embeddings: bool,
}

impl Default for LayoutLmConfig {
    fn default() -> Self {
        Self {
            vocab_size: 30522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            layer_norm_eps: 1e-12,
            max_2d_position_embeddings: 1024,
            tie_word_embeddings: true,
        }
    }
}

impl LayoutLmConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is malformed, contradicts another, or isn't supported.
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
        ])?;
        config::multiple(("hidden_size", cfg.hidden_size), ("num_attention_heads", cfg.num_attention_heads))?;
        config::not_negative(&[("layer_norm_eps", cfg.layer_norm_eps)])?;
        config::refuse_unless(spec, "position_embedding_type", &["absolute".into()])?;
        Ok(cfg)
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
            tie_word_embeddings: self.tie_word_embeddings,
        }
    }
}

/// Where each word stands on the page.
pub(super) struct Boxes {
    /// Left, upper, right and lower edge, each (batch, seq).
    pub(super) edges: [Tensor; 4],
    /// Height and width, each (batch, seq).
    pub(super) sizes: [Tensor; 2],
}

impl Boxes {
    /// Reads `bbox` (batch, seq, 4), with coordinates below `limit`; zeros where the call has none. Heights and widths are
    /// brought into `0..=clip`, or have to be in their table.
    pub(super) fn read(inputs: &Inputs, ids: &Tensor, limit: usize, clip: Option<i64>) -> Result<Self, SessionError> {
        let (batch, seq) = ids.dims2()?;
        let boxes = match inputs.integers("bbox", &[batch, seq, 4])? {
            Some(boxes) => boxes,
            None => Tensor::zeros((batch, seq, 4), DType::I64, ids.device())?,
        };
        in_range("bbox", &boxes, "max_2d_position_embeddings", limit)?;
        let edge = |i: usize| boxes.narrow(2, i, 1)?.squeeze(2)?.contiguous();
        let edges = [edge(0)?, edge(1)?, edge(2)?, edge(3)?];
        let size = |from: usize, to: usize| {
            let size = (&edges[to] - &edges[from])?;
            match clip {
                Some(most) => size.clamp(0i64, most),
                None => Ok(size),
            }
        };
        let sizes = [size(1, 3)?, size(0, 2)?];
        for (name, size) in ["bbox (its height)", "bbox (its width)"].into_iter().zip(&sizes) {
            in_range(name, size, "max_2d_position_embeddings", limit)?;
        }
        Ok(Self { edges, sizes })
    }
}

/// The tables of places: those of both coordinates, of heights and of widths.
pub(super) struct BoxEmbeddings {
    x: Embedding,
    y: Embedding,
    h: Embedding,
    w: Embedding,
}

impl BoxEmbeddings {
    /// Reads tables of `rows` rows, as wide as `coordinate` and `shape` say.
    pub(super) fn load(rows: usize, coordinate: usize, shape: usize, vb: VarBuilder) -> Result<Self> {
        let table = |name: &str, width| Embedding::load(rows, width, vb.pp(format!("{name}_position_embeddings")));
        Ok(Self {
            x: table("x", coordinate)?,
            y: table("y", coordinate)?,
            h: table("h", shape)?,
            w: table("w", shape)?,
        })
    }

    /// Of all edges and sizes, each (batch, seq, width of its table).
    pub(super) fn forward(&self, boxes: &Boxes) -> Result<[Tensor; 6]> {
        let ([left, upper, right, lower], [height, width]) = (&boxes.edges, &boxes.sizes);
        Ok([
            self.x.forward(left)?,
            self.y.forward(upper)?,
            self.x.forward(right)?,
            self.y.forward(lower)?,
            self.h.forward(height)?,
            self.w.forward(width)?,
        ])
    }
}

/// Start and end of an answer (batch, seq) from the scores of both (batch, seq, 2).
pub(super) fn answer(scores: &Tensor) -> Result<Tensors> {
    let of = |i: usize| scores.narrow(2, i, 1)?.squeeze(2)?.contiguous();
    Ok(Tensors::from([("start_logits".into(), of(0)?), ("end_logits".into(), of(1)?)]))
}

/// Checks that a class that scores start and end of an answer has two labels.
pub(super) fn two_labels(spec: &ModelSpec) -> Result<usize, SessionError> {
    match label_count(&spec.config)? {
        2 => Ok(2),
        labels => Err(config::invalid("num_labels", format!("{labels} is not 2, the start of an answer and its end"))),
    }
}

/// What follows the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HeadKind {
    Pooler,
    MaskedLm,
    /// Labels of the page.
    Page {
        labels: usize,
    },
    /// Labels of every word.
    Words {
        labels: usize,
    },
    Answer,
}

impl HeadKind {
    fn of(spec: &ModelSpec) -> Result<Self, SessionError> {
        match spec.class.as_str() {
            "LayoutLMModel" => Ok(Self::Pooler),
            "LayoutLMForMaskedLM" => Ok(Self::MaskedLm),
            "LayoutLMForSequenceClassification" => Ok(Self::Page { labels: label_count(&spec.config)? }),
            "LayoutLMForTokenClassification" => Ok(Self::Words { labels: label_count(&spec.config)? }),
            "LayoutLMForQuestionAnswering" => two_labels(spec).map(|_| Self::Answer),
            _ => Err(config::unsupported_class(spec, CLASSES)),
        }
    }

    /// The first rows of the last layer that it reads, when that is not all.
    fn rows(self) -> Option<usize> {
        if let Self::Page { .. } = self { Some(1) } else { None }
    }
}

/// The layers of a [`HeadKind`].
enum Head {
    Pooler(Pooler),
    MaskedLm(PredictionHead),
    Page { pooler: Pooler, classifier: Linear },
    Words { classifier: Linear },
    Answer { qa_outputs: Linear },
}

impl Head {
    /// `vb` is the checkpoint's root, `layoutlm` the encoder's part of it.
    fn load(
        kind: HeadKind,
        cfg: &LayoutLmConfig,
        vb: VarBuilder,
        layoutlm: VarBuilder,
        words: &Embedding,
    ) -> Result<Self> {
        let pooler = || Pooler::load(cfg.hidden_size, layoutlm.pp("pooler"));
        let linear = |labels: usize, name: &str| Linear::load(cfg.hidden_size, labels, true, vb.pp(name));
        // every class has a pooler, whether its state is used or not
        if matches!(kind, HeadKind::MaskedLm | HeadKind::Words { .. } | HeadKind::Answer) {
            Pooler::skip(cfg.hidden_size, layoutlm.pp("pooler"))?;
        }
        Ok(match kind {
            HeadKind::Pooler => Self::Pooler(pooler()?),
            HeadKind::MaskedLm => Self::MaskedLm(bert::masked_lm_head(&cfg.bert(), vb.pp("cls.predictions"), words)?),
            HeadKind::Page { labels } => Self::Page { pooler: pooler()?, classifier: linear(labels, "classifier")? },
            HeadKind::Words { labels } => Self::Words { classifier: linear(labels, "classifier")? },
            HeadKind::Answer => Self::Answer { qa_outputs: linear(2, "qa_outputs")? },
        })
    }

    /// Output fields of the class from the encoder's result (batch, seq, hidden).
    fn forward(&self, x: Tensor) -> Result<Tensors> {
        let logits = match self {
            Self::Pooler(pooler) => {
                let pooled = pooler.forward(&x)?; // (batch, hidden)
                return Ok(Tensors::from([("last_hidden_state".into(), x), ("pooler_output".into(), pooled)]));
            }
            Self::Answer { qa_outputs } => return answer(&qa_outputs.forward(&x)?),
            Self::MaskedLm(head) => head.forward(&x)?, // (batch, seq, vocab)
            Self::Page { pooler, classifier } => classifier.forward(&pooler.forward(&x)?)?, // (batch, labels)
            Self::Words { classifier } => classifier.forward(&x)?, // (batch, seq, labels)
        };
        Ok(Tensors::from([("logits".into(), logits)]))
    }
}

/// The encoder with the head of its class.
pub struct LayoutLmModel {
    cfg: LayoutLmConfig,
    embeddings: bert::Embeddings,
    box_embeddings: BoxEmbeddings,
    encoder: Encoder,
    head: Head,
    kind: HeadKind,
    bytes_per_element: u64,
    paths: BTreeMap<String, String>,
}

impl LayoutLmModel {
    /// Loads the class of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// Names the config field or the tensor at fault, or the class when it is none of [`CLASSES`].
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let (kind, cfg) = (HeadKind::of(spec)?, LayoutLmConfig::from_spec(spec)?);
        let layoutlm = if kind == HeadKind::Pooler { vb.clone() } else { vb.pp("layoutlm") };
        let embeddings = bert::Embeddings::load(&cfg.bert(), layoutlm.pp("embeddings"))?;
        let (rows, hidden) = (cfg.max_2d_position_embeddings, cfg.hidden_size);
        Ok(Self {
            box_embeddings: BoxEmbeddings::load(rows, hidden, hidden, layoutlm.pp("embeddings"))?,
            encoder: Encoder::load(&cfg.bert(), kind.rows().is_some(), layoutlm.pp("encoder"))?,
            head: Head::load(kind, &cfg, vb, layoutlm, &embeddings.word_embeddings)?,
            embeddings,
            kind,
            bytes_per_element: spec.dtype.size_in_bytes() as u64,
            paths: isa::paths(&spec.device, spec.dtype),
            cfg,
        })
    }

    fn forward(&self, words: &Words) -> Result<Tensors> {
        let mask = words.ids.attention_mask.as_ref().map(Mask::padding).transpose()?.flatten();
        let [first, others @ ..] = self.box_embeddings.forward(&words.boxes)?;
        roofbench_nn::cost::elementwise(first.elem_count(), others.len());
        let places = others.iter().try_fold(first, |sum, place| sum + place)?; // (batch, seq, hidden)
        let x = self.embeddings.forward_add(&words.ids, &places)?;
        self.head.forward(self.encoder.forward(x, &self.kind.rows().into(), mask.as_ref())?)
    }
}

/// The arguments of `forward`, checked.
struct Words {
    ids: TokenIds,
    boxes: Boxes,
}

impl Words {
    fn read(cfg: &LayoutLmConfig, call: &Call) -> Result<Self, SessionError> {
        let known = ["input_ids", "bbox", "attention_mask", "token_type_ids", "position_ids"];
        let inputs = Inputs::forward(call, &known, &[])?;
        let ids = TokenIds::of(&cfg.bert(), &inputs, "input_ids")?;
        let boxes = Boxes::read(&inputs, &ids.input_ids, cfg.max_2d_position_embeddings, None)?;
        Ok(Self { ids, boxes })
    }
}

impl Session for LayoutLmModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let outputs = self.forward(&Words::read(&self.cfg, call)?)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let (batch, seq) = Words::read(&self.cfg, call)?.ids.input_ids.dims2()?;
        let cost = forward_cost(&self.cfg, self.kind, [batch, seq], self.bytes_per_element);
        Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }])
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// FLOPs and bytes of one forward pass over (batch, seq) words.
fn forward_cost(cfg: &LayoutLmConfig, kind: HeadKind, [batch, seq]: [usize; 2], bytes: u64) -> Cost {
    let (hidden, bert) = (cfg.hidden_size as u64, cfg.bert());
    let tokens = (batch * seq) as u64;
    let linear = |rows: u64, labels: usize| cost::linear(rows, hidden, labels as u64, true, bytes);
    // six places looked up and added
    let places = cost::embedding(tokens, hidden, bytes) * 6 + cost::elementwise(tokens * hidden, 6);
    let head = match kind {
        HeadKind::Pooler => Pooler::cost(batch, cfg.hidden_size, bytes),
        HeadKind::MaskedLm => PredictionHead::cost(batch * seq, cfg.hidden_size, cfg.vocab_size, bytes),
        HeadKind::Page { labels } => Pooler::cost(batch, cfg.hidden_size, bytes) + linear(batch as u64, labels),
        HeadKind::Words { labels } => linear(tokens, labels),
        HeadKind::Answer => linear(tokens, 2),
    };
    bert::Embeddings::cost(&bert, [batch, seq], bytes)
        + places
        + Encoder::cost(&bert, [batch, seq], kind.rows().unwrap_or(seq), bytes)
        + head
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use serde_json::json;

    use super::*;

    fn spec(class: &str, config: Value) -> ModelSpec {
        ModelSpec::new("layoutlm", class, config)
    }

    fn message<T>(result: Result<T, SessionError>) -> String {
        result.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn configs_and_classes_that_do_not_fit_are_refused() {
        let read = |config| message(LayoutLmConfig::from_spec(&spec("LayoutLMModel", config)));
        assert_eq!(read(json!({})), "");
        assert!(read(json!({"position_embedding_type": "relative_key"})).contains("`position_embedding_type`"));
        assert!(read(json!({"num_attention_heads": 7})).contains("`hidden_size`: 768 is not a multiple of"));
        assert!(
            read(json!({"max_2d_position_embeddings": 0})).contains("`max_2d_position_embeddings`: 0 is not in 1..=")
        );
        let class = |class, config| message(HeadKind::of(&spec(class, config)));
        assert!(class("LayoutLMForQuestionAnswering", json!({"num_labels": 3})).contains("`num_labels`: 3 is not 2"));
        assert_eq!(class("LayoutLMForQuestionAnswering", json!({})), "");
        assert!(class("LayoutLMForPreTraining", json!({})).contains("`LayoutLMForPreTraining` is not supported"));
    }

    #[test]
    fn boxes_have_to_lie_on_the_page() {
        let cfg = LayoutLmConfig::from_spec(&spec("LayoutLMModel", json!({}))).expect("a config");
        let read = |bbox: [i64; 4]| {
            let inputs = Tensors::from([
                ("input_ids".into(), Tensor::new(&[[5i64]], &Device::Cpu).expect("ids")),
                ("bbox".into(), Tensor::new(&[[bbox]], &Device::Cpu).expect("boxes")),
            ]);
            message(Words::read(&cfg, &Call { method: "forward".into(), inputs, ..Call::default() }))
        };
        assert_eq!(read([0, 10, 1000, 20]), "");
        assert_eq!(
            read([0, 10, 1024, 20]),
            "input `bbox`: element 2 is 1024, beyond max_2d_position_embeddings = 1024"
        );
        assert!(read([0, 30, 10, 20]).starts_with("input `bbox (its height)`: element 0 is -10"));
        assert!(read([30, 0, 10, 20]).starts_with("input `bbox (its width)`: element 0 is -20"));
    }

    /// At the published size it is BERT and six additions more; BERT-base at 128 tokens has 22.36 GFLOPs published.
    #[test]
    fn cost_is_that_of_bert_and_places() {
        let cfg = LayoutLmConfig::from_spec(&spec("LayoutLMModel", json!({}))).expect("a config");
        let flops = |kind| forward_cost(&cfg, kind, [1, 128], 4).flops;
        let places = 6 * 128 * 768;
        let encoder = flops(HeadKind::Pooler);
        assert!(((encoder - places) as f64 / 22.36e9 - 1.0).abs() < 0.003, "{encoder}");
        let pooler = 2 * 768 * 768 + 2 * 768;
        assert_eq!(flops(HeadKind::Words { labels: 7 }), encoder - pooler + 128 * (2 * 768 * 7 + 7));
        assert_eq!(flops(HeadKind::Answer), encoder - pooler + 128 * (2 * 768 * 2 + 2));
        // of the last layer only keys and values of 127 rows are made; the others' four products, biases, residuals,
        // activation, norms, and pairs with 128 keys in each of 12 heads of 64 are not
        let products = 2 * 768 * (2 * 768 + 2 * 3072) + 3 * 768 + 3072;
        let rest = 127 * (products + 2 * 768 + 3072 + 2 * 7 * 768 + 128 * 12 * (4 * 64 + 5));
        assert_eq!(flops(HeadKind::Page { labels: 7 }), encoder + 2 * 768 * 7 + 7 - rest);
    }

    #[test]
    fn alias_rules_depend_on_class_and_tying() {
        let patterns = |class: &str, config: Value| {
            aliases(&spec(class, config)).iter().map(|rule| rule.pattern).collect::<Vec<_>>()
        };
        let drops_the_head = |patterns: &[&str]| patterns.contains(&r"^cls\.");
        let tied = patterns("LayoutLMForMaskedLM", json!({}));
        assert!(tied[0].contains("decoder") && !drops_the_head(&tied));
        let untied = patterns("LayoutLMForMaskedLM", json!({"tie_word_embeddings": false}));
        assert!(!untied[0].contains("decoder") && !drops_the_head(&untied));
        assert!(drops_the_head(&patterns("LayoutLMForTokenClassification", json!({}))));
        assert!(patterns("LayoutLMv3ForTokenClassification", json!({})).iter().any(|rule| rule.contains("pos_embed")));
    }
}
