//! Decoder-only language models as sessions: `forward` over whole sequences and `generate` on a cache, with padding on
//! either side.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use roofbench_core::cost::{Cost, PhaseCost};
use roofbench_core::generation::Generation;
use roofbench_core::inputs::{Inputs, in_range, unsupported_method, zero_or_one};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_nn::decoding::Decoding;
use roofbench_nn::kernels::isa;
use roofbench_nn::kv_cache;

/// What a session needs to know of a decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecoderShape {
    /// Distinct tokens.
    pub vocab_size: usize,
    /// Layers, each with keys and values.
    pub layers: usize,
    /// Width of a key or value row, kv_heads · head_dim.
    pub kv_width: usize,
    /// The last positions that a token sees, itself included; all where absent.
    pub window: Option<usize>,
    /// The most positions, where it has no more embeddings of them.
    pub max_positions: Option<usize>,
}

impl DecoderShape {
    /// Room for `positions` positions of `batch` sequences.
    ///
    /// # Errors
    /// When memory cannot be had.
    pub fn decoding(&self, batch: usize, positions: usize, spec: &ModelSpec) -> Result<Decoding> {
        let shape = kv_cache::Shape { batch, positions, width: self.kv_width };
        let dtype = if spec.device.is_cpu() { DType::F32 } else { spec.dtype };
        Decoding::cached(self.layers, shape, self.window, dtype, &spec.device)
    }

    /// Refuses sequences of more positions than there are embeddings of; `name` is the argument that asks for them.
    ///
    /// # Errors
    /// Names the argument.
    pub fn check_length(&self, name: &str, positions: usize) -> Result<(), SessionError> {
        match self.max_positions {
            Some(most) if positions > most => {
                Err(SessionError::input(name, format!("comes to {positions} positions, the model has {most}")))
            }
            _ => Ok(()),
        }
    }
}

/// One pass of a decoder, for its cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// Sequences.
    pub batch: u64,
    /// Rows of each.
    pub seq: u64,
    /// Positions before them.
    pub cached: u64,
    /// Rows of each that logits are made of: all, or the last.
    pub logits: u64,
}

/// A decoder-only language model; its keys and values are the caller's.
pub trait CausalLm {
    /// Its sizes.
    fn shape(&self) -> DecoderShape;

    /// The embeddings of tokens, without positions.
    ///
    /// # Shapes
    /// (batch, seq) → (batch, seq, hidden).
    ///
    /// # Errors
    /// Candle's.
    fn embed(&self, input_ids: &Tensor) -> Result<Tensor>;

    /// The states after the last layer and its normalisation, from embeddings at the positions of `decoding`.
    ///
    /// # Shapes
    /// (batch, seq, hidden) → (batch, seq, hidden).
    ///
    /// # Errors
    /// Candle's.
    fn decode(&self, x: Tensor, decoding: &mut Decoding) -> Result<Tensor>;

    /// Scores of every token.
    ///
    /// # Shapes
    /// (..., hidden) → (..., vocab).
    ///
    /// # Errors
    /// Candle's.
    fn logits(&self, x: &Tensor) -> Result<Tensor>;

    /// FLOPs and bytes of one pass, by formula.
    fn cost(&self, pass: Pass) -> Cost;
}

/// A [`CausalLm`] behind the calls of its class.
pub(crate) struct CausalSession<M> {
    model: M,
    spec: ModelSpec,
    paths: BTreeMap<String, String>,
}

/// The tokens of a call.
struct Prompt {
    /// (batch, seq), i64.
    input_ids: Tensor,
    /// (batch, seq) of 0 and 1.
    attention_mask: Option<Tensor>,
    /// (batch, seq), where the call has its own.
    position_ids: Option<Tensor>,
}

impl<M: CausalLm> CausalSession<M> {
    pub(crate) fn new(model: M, spec: &ModelSpec) -> Self {
        let paths = isa::paths(&spec.device, spec.dtype);
        Self { model, spec: spec.clone(), paths }
    }

    fn read(&self, call: &Call) -> Result<Prompt, SessionError> {
        let inputs = match call.method.as_str() {
            "forward" => Inputs::forward(call, &["input_ids", "attention_mask", "position_ids"], &["use_cache"])?,
            "generate" => Inputs::of_any_method(call, &["input_ids", "attention_mask"])?,
            _ => return Err(unsupported_method(call, "forward, generate")),
        };
        let shape = self.model.shape();
        let input_ids = inputs.matrix("input_ids")?;
        in_range("input_ids", &input_ids, "vocab_size", shape.vocab_size)?;
        let attention_mask = inputs.matrix_like("attention_mask", &input_ids)?;
        if let Some(mask) = &attention_mask {
            zero_or_one("attention_mask", mask)?;
        }
        let position_ids = inputs.matrix_like("position_ids", &input_ids)?;
        if let Some(ids) = &position_ids {
            in_range("position_ids", ids, "max_position_embeddings", shape.max_positions.unwrap_or(1 << 24))?;
        }
        Ok(Prompt { input_ids, attention_mask, position_ids })
    }

    fn forward(&self, prompt: &Prompt) -> Result<Tensors, SessionError> {
        let (batch, seq) = prompt.input_ids.dims2()?;
        self.model.shape().check_length("input_ids", seq)?;
        let mut decoding = Decoding::once(batch, seq, prompt.attention_mask.as_ref(), &self.spec.device)?;
        if let Some(position_ids) = &prompt.position_ids {
            decoding = decoding.with_positions(position_ids)?;
        }
        let x = self.model.embed(&prompt.input_ids)?; // (batch, seq, hidden)
        let x = self.model.decode(x, &mut decoding)?;
        Ok(Tensors::from([("logits".to_owned(), self.model.logits(&x)?)]))
    }

    fn generate(&self, call: &Call, prompt: Prompt, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let (batch, seq) = prompt.input_ids.dims2()?;
        let generation = Generation::read(&self.spec, call, seq, &[])?;
        self.model.shape().check_length("max_new_tokens", generation.positions(seq))?;
        let ids = prompt.input_ids.to_vec2::<i64>()?;
        let (placed, mask) = at_the_end(&ids, prompt.attention_mask.as_ref())?;
        let device = &self.spec.device;
        let embed = |ids: &[Vec<i64>]| {
            let ids = Tensor::from_vec(ids.concat(), (ids.len(), ids[0].len()), device)?;
            self.model.embed(&ids)
        };
        let mut decoding = self.decoding(batch, generation.positions(seq))?;
        if let Some(mask) = mask {
            decoding = decoding.with_attention_mask(&mask)?;
        }
        generation.run(&ids, observer, |tokens| {
            let x = match tokens {
                None => embed(&placed)?,
                Some(tokens) => embed(&tokens.iter().map(|token| vec![*token]).collect::<Vec<_>>())?,
            };
            Ok(next_logits(&self.model, x, &mut decoding)?)
        })
    }

    fn decoding(&self, batch: usize, positions: usize) -> Result<Decoding> {
        decoding(&self.model, batch, positions, &self.spec)
    }
}

/// Room for `positions` positions of `batch` sequences of a decoder.
///
/// # Errors
/// When memory cannot be had.
pub fn decoding(model: &impl CausalLm, batch: usize, positions: usize, spec: &ModelSpec) -> Result<Decoding> {
    model.shape().decoding(batch, positions, spec)
}

/// The logits of the token behind the rows `x` (batch, seq, hidden), which follow what `decoding` has: (batch, vocab).
///
/// # Errors
/// Candle's.
pub fn next_logits(model: &impl CausalLm, x: Tensor, decoding: &mut Decoding) -> Result<Tensor> {
    let seq = x.dim(1)?;
    decoding.advance(seq)?;
    let x = model.decode(x, decoding)?; // (batch, seq, hidden)
    model.logits(&x.narrow(1, seq - 1, 1)?.contiguous()?.squeeze(1)?)
}

/// The sequences with their padding before them, and the mask that says so, where there is any: what follows the last
/// token of a sequence has to be behind it.
fn at_the_end(ids: &[Vec<i64>], mask: Option<&Tensor>) -> Result<(Vec<Vec<i64>>, Option<Tensor>), SessionError> {
    let Some(mask) = mask else { return Ok((ids.to_vec(), None)) };
    let mut rows = mask.to_vec2::<i64>()?;
    let mut placed = ids.to_vec();
    for (item, (row, ids)) in rows.iter_mut().zip(&mut placed).enumerate() {
        let Some(last) = row.iter().rposition(|exists| *exists == 1) else {
            return Err(SessionError::input("attention_mask", format!("keeps no token of sequence {item}")));
        };
        let behind = row.len() - 1 - last;
        row.rotate_right(behind);
        ids.rotate_right(behind);
    }
    Ok((placed, Some(Tensor::new(rows, &candle_core::Device::Cpu)?)))
}

impl<M: CausalLm> Session for CausalSession<M> {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let prompt = self.read(call)?;
        if call.method == "generate" {
            return self.generate(call, prompt, observer);
        }
        let outputs = self.forward(&prompt)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let (batch, seq) = self.read(call)?.input_ids.dims2()?;
        let (rows, length) = (batch as u64, seq as u64);
        if call.method == "forward" {
            let cost = self.model.cost(Pass { batch: rows, seq: length, cached: 0, logits: length });
            return Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }]);
        }
        let generation = Generation::read(&self.spec, call, seq, &[])?;
        Ok(generate_cost(&self.model, [rows, length], generation.max_new_tokens as u64))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// Prefill of (batch, seq) rows and the decoding of `new_tokens` tokens, the first of which the prefill gives.
pub fn generate_cost(model: &impl CausalLm, shape: [u64; 2], new_tokens: u64) -> Vec<PhaseCost> {
    generate_cost_by(|pass| model.cost(pass), shape, new_tokens)
}

/// The same of a decoder whose passes cost what `cost` says.
pub(crate) fn generate_cost_by(cost: impl Fn(Pass) -> Cost, [batch, seq]: [u64; 2], new_tokens: u64) -> Vec<PhaseCost> {
    let prefill = cost(Pass { batch, seq, cached: 0, logits: 1 });
    let step = |made| cost(Pass { batch, seq: 1, cached: seq + made - 1, logits: 1 });
    phases(prefill, (1..new_tokens).map(step).sum(), new_tokens)
}

/// A prefill that gives the first of `new_tokens` tokens and the decoding of the others, where there are any.
pub(crate) fn phases(prefill: Cost, decode: Cost, new_tokens: u64) -> Vec<PhaseCost> {
    let phases = [(Phase::Prefill, 1, prefill), (Phase::Decode, new_tokens - 1, decode)];
    let there = phases.into_iter().filter(|(_, repeats, _)| *repeats > 0);
    there.map(|(phase, repeats, cost)| PhaseCost { phase, repeats, cost }).collect()
}
