//! Tokens one after another, as `transformers.GenerationMixin.generate` makes them: how many, which of the logits, when
//! to stop. How a model comes to its logits is its own affair.

use std::collections::HashSet;

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::session::{Arguments, Call, ModelSpec, Observer, Phase, SessionError, Tensors};
use crate::weights::synthetic;

/// New tokens where nothing says how many, as in the library.
const DEFAULT_MAX_NEW_TOKENS: usize = 20;

/// Tokens that sampling draws from where nothing says how many, as in the library.
const DEFAULT_TOP_K: usize = 50;

/// How tokens are drawn, in the order in which it is applied.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divisor of the logits.
    pub temperature: f32,
    /// Only so many of the likeliest; all where 0.
    pub top_k: usize,
    /// Only the likeliest that hold this much probability together.
    pub top_p: f32,
    /// Of the stream of random numbers.
    pub seed: u64,
}

/// What decides over the tokens of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Most new tokens of a sequence.
    pub max_new_tokens: usize,
    /// The end token is kept away for so many.
    pub min_new_tokens: usize,
    /// The likeliest token is taken where absent.
    pub sampling: Option<Sampling>,
    /// Divides the logits of tokens that are there already, above 0; multiplies them below (arXiv:1909.05858).
    pub repetition_penalty: f32,
    /// No run of so many tokens comes twice; 0 allows all.
    pub no_repeat_ngram_size: usize,
    /// Each ends a sequence.
    pub eos_token_id: Vec<i64>,
    /// What follows a sequence that ended before the others of its batch.
    pub pad_token_id: i64,
    /// First token of a decoder behind an encoder.
    pub decoder_start_token_id: Option<i64>,
    /// First token of a decoder or of text where there is no prompt.
    pub bos_token_id: Option<i64>,
    /// Second token of a decoder, whatever its logits.
    pub forced_bos_token_id: Option<i64>,
    /// The last token if the length is reached.
    pub forced_eos_token_id: Option<i64>,
    /// Never taken.
    pub suppress_tokens: Vec<i64>,
    /// Not taken first.
    pub begin_suppress_tokens: Vec<i64>,
    /// The call wants every step's logits.
    pub output_logits: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(i64),
    Many(Vec<i64>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<i64> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

#[derive(Deserialize)]
struct Raw {
    max_length: Option<usize>,
    max_new_tokens: Option<usize>,
    min_length: Option<usize>,
    min_new_tokens: Option<usize>,
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<usize>,
    top_p: Option<f32>,
    seed: Option<u64>,
    repetition_penalty: Option<f32>,
    no_repeat_ngram_size: Option<usize>,
    bos_token_id: Option<i64>,
    eos_token_id: Option<OneOrMany>,
    pad_token_id: Option<i64>,
    decoder_start_token_id: Option<i64>,
    forced_bos_token_id: Option<i64>,
    forced_eos_token_id: Option<i64>,
    suppress_tokens: Option<Vec<i64>>,
    begin_suppress_tokens: Option<Vec<i64>>,
    output_logits: Option<bool>,
}

/// Token ids that config.json gives where the repository has no generation_config.json.
const CONFIG_FIELDS: [&str; 6] = [
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
];

/// Fields that change nothing here: about files, caches, other outputs, and beams where there is one.
const NEUTRAL: [&str; 7] = [
    "_from_model_config",
    "transformers_version",
    "use_cache",
    "cache_implementation",
    "return_dict_in_generate",
    "early_stopping",
    "length_penalty",
];

/// Fields that change the tokens and are not supported, with the values at which they change nothing.
const REFUSED: [(&str, &[&str]); 23] = [
    ("num_beams", &["1"]),
    ("num_beam_groups", &["1"]),
    ("num_return_sequences", &["1"]),
    ("output_scores", &["false"]),
    ("output_attentions", &["false"]),
    ("output_hidden_states", &["false"]),
    ("penalty_alpha", &["0", "0.0"]),
    ("diversity_penalty", &["0", "0.0"]),
    ("encoder_repetition_penalty", &["1", "1.0"]),
    ("encoder_no_repeat_ngram_size", &["0"]),
    ("min_p", &["0", "0.0"]),
    ("top_h", &[]),
    ("typical_p", &["1", "1.0"]),
    ("epsilon_cutoff", &["0", "0.0"]),
    ("eta_cutoff", &["0", "0.0"]),
    ("bad_words_ids", &[]),
    ("force_words_ids", &[]),
    ("constraints", &[]),
    ("exponential_decay_length_penalty", &[]),
    ("sequence_bias", &[]),
    ("guidance_scale", &["1", "1.0"]),
    ("forced_decoder_ids", &[]),
    ("stop_strings", &[]),
];

/// Makes a checkpoint that asks for beams generate greedily, unless `arguments` decide: sets `num_beams` to 1, and gives
/// a line that says so to people.
pub fn without_beams(spec: &ModelSpec, arguments: &mut Arguments) -> Option<String> {
    let beams = spec.extra_configs.get("generation_config.json").unwrap_or(&spec.config).get("num_beams")?.as_u64()?;
    if beams < 2 || arguments.contains_key("num_beams") {
        return None;
    }
    arguments.insert("num_beams".to_owned(), 1.into());
    Some(format!("the checkpoint searches with {beams} beams, which is not supported; this is its greedy choice"))
}

impl Generation {
    /// From the arguments of `call`, for what they leave out from the checkpoint's generation_config.json, or from the
    /// token ids of config.json where there is no such file. `prompt` is the length that `max_length` counts in; `own` are
    /// arguments that the class reads by itself.
    ///
    /// # Errors
    /// Names the argument or field that is malformed or not supported.
    pub fn read(spec: &ModelSpec, call: &Call, prompt: usize, own: &[&str]) -> Result<Self, SessionError> {
        let mut fields = match spec.extra_configs.get("generation_config.json").and_then(Value::as_object) {
            Some(fields) => fields.clone(),
            None => config_fields(&spec.config),
        };
        for (name, value) in &call.arguments {
            // a length of the call replaces the checkpoint's in either form
            if let Some(bound) = name.strip_suffix("_new_tokens") {
                fields.remove(&format!("{bound}_length"));
            }
            fields.insert(name.clone(), value.clone());
        }
        fields.retain(|name, value| !value.is_null() && !own.contains(&name.as_str()));
        for (name, neutral) in REFUSED {
            if let Some(value) = fields.get(name)
                && !neutral.contains(&value.to_string().as_str())
            {
                let otherwise = match neutral.first() {
                    Some(neutral) => format!("pass {name} = {neutral}"),
                    None => format!("pass {name} = null"),
                };
                return Err(SessionError::input(name, format!("is {value}, which is not supported; {otherwise}")));
            }
        }
        if let Some(name) = call.arguments.keys().find(|name| !is_known(name) && !own.contains(&name.as_str())) {
            return Err(SessionError::input(name, "is no argument of generate that is supported"));
        }
        let raw: Raw = serde_path_to_error::deserialize(Value::Object(fields)).map_err(|error| {
            SessionError::input(&error.path().to_string(), format!("(generation): {}", error.inner()))
        })?;
        let max_new_tokens = match (raw.max_new_tokens, raw.max_length) {
            (Some(new), _) => new,
            (None, Some(length)) => length.saturating_sub(prompt),
            (None, None) => DEFAULT_MAX_NEW_TOKENS,
        };
        if max_new_tokens == 0 {
            let reason = format!("leaves room for no token after {prompt} of the prompt; pass max_new_tokens");
            return Err(SessionError::input("max_new_tokens", reason));
        }
        let min_new_tokens = match (raw.min_new_tokens, raw.min_length) {
            (Some(new), _) => new,
            (None, length) => length.unwrap_or(0).saturating_sub(prompt),
        };
        let sampling = raw.do_sample.unwrap_or(false).then(|| Sampling {
            temperature: raw.temperature.unwrap_or(1.0),
            top_k: raw.top_k.unwrap_or(DEFAULT_TOP_K),
            top_p: raw.top_p.unwrap_or(1.0),
            seed: raw.seed.unwrap_or(0),
        });
        let penalty = raw.repetition_penalty.unwrap_or(1.0);
        for (name, value) in [
            ("temperature", sampling.map_or(1.0, |sampling| sampling.temperature)),
            ("top_p", sampling.map_or(1.0, |sampling| sampling.top_p)),
            ("repetition_penalty", penalty),
        ] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(SessionError::input(name, format!("is {value}, expected a positive number")));
            }
        }
        let eos_token_id = raw.eos_token_id.map(OneOrMany::into_vec).unwrap_or_default();
        Ok(Self {
            max_new_tokens,
            min_new_tokens,
            sampling,
            repetition_penalty: penalty,
            no_repeat_ngram_size: raw.no_repeat_ngram_size.unwrap_or(0),
            pad_token_id: raw.pad_token_id.or(eos_token_id.first().copied()).unwrap_or(0),
            eos_token_id,
            bos_token_id: raw.bos_token_id,
            decoder_start_token_id: raw.decoder_start_token_id,
            forced_bos_token_id: raw.forced_bos_token_id,
            forced_eos_token_id: raw.forced_eos_token_id,
            suppress_tokens: raw.suppress_tokens.unwrap_or_default(),
            begin_suppress_tokens: raw.begin_suppress_tokens.unwrap_or_default(),
            output_logits: raw.output_logits.unwrap_or(false),
        })
    }

    /// The first token of a decoder behind an encoder.
    ///
    /// # Errors
    /// When neither the call nor the checkpoint says.
    pub fn decoder_start(&self) -> Result<i64, SessionError> {
        self.decoder_start_token_id.or(self.bos_token_id).ok_or_else(|| {
            let reason = "is missing in the call, generation_config.json and config.json";
            SessionError::input("decoder_start_token_id", reason)
        })
    }

    /// Positions that a cache needs room for behind a prompt of so many: the last token is not fed back.
    pub fn positions(&self, prompt: usize) -> usize {
        prompt + self.max_new_tokens - 1
    }

    /// Runs the steps behind `prompt`, the ids of each sequence so far, all of one length.
    ///
    /// `step` is first called with `None` and runs the prompt, then with the token that each sequence goes on with; it
    /// gives the logits of the next, (batch, vocab). Each choice ends a phase for `observer`.
    ///
    /// The result holds `sequences` (batch, prompt + new), i64, and where they are wanted `logits` (batch, new, vocab), as
    /// the model gave them.
    ///
    /// # Errors
    /// Those of `step`; a prompt of sequences of different lengths, or none.
    pub fn run(
        &self,
        prompt: &[Vec<i64>],
        observer: &mut dyn Observer,
        step: impl FnMut(Option<&[i64]>) -> Result<Tensor, SessionError>,
    ) -> Result<Tensors, SessionError> {
        self.run_with(prompt, observer, &|_, _| {}, step)
    }

    /// The same with a class's own `rule`: it gets the tokens that a sequence has beyond the prompt and, after all other
    /// rules, the logits of its next one, of which it may change any.
    ///
    /// # Errors
    /// As for [`run`](Self::run).
    pub fn run_with(
        &self,
        prompt: &[Vec<i64>],
        observer: &mut dyn Observer,
        rule: &dyn Fn(&[i64], &mut [f32]),
        mut step: impl FnMut(Option<&[i64]>) -> Result<Tensor, SessionError>,
    ) -> Result<Tensors, SessionError> {
        let start = prompt.first().map_or(0, Vec::len);
        if prompt.iter().any(|row| row.len() != start) {
            return Err(SessionError::input("input_ids", "holds sequences of different lengths"));
        }
        let mut sequences = prompt.to_vec();
        let mut ended = vec![false; sequences.len()];
        let mut kept = Vec::new();
        let mut tokens: Option<Vec<i64>> = None;
        for made in 0..self.max_new_tokens {
            let logits = step(tokens.as_deref())?.to_dtype(DType::F32)?; // (batch, vocab)
            let rows = logits.to_vec2::<f32>()?;
            if rows.len() != sequences.len() {
                let reason = format!("give {} rows for {} sequences", rows.len(), sequences.len());
                return Err(SessionError::input("logits", reason));
            }
            if self.output_logits {
                kept.push(logits);
            }
            let chosen: Vec<i64> = (rows.into_iter().enumerate())
                .map(|(item, row)| match ended[item] {
                    true => Ok(self.pad_token_id),
                    false => self.choose(item, &sequences[item], start, row, rule),
                })
                .collect::<Result<_, _>>()?;
            for (item, token) in chosen.iter().enumerate() {
                sequences[item].push(*token);
                ended[item] |= self.eos_token_id.contains(token);
            }
            observer.tokens(&chosen);
            observer.end(if made == 0 { Phase::Prefill } else { Phase::Decode });
            if ended.iter().all(|ended| *ended) {
                break;
            }
            tokens = Some(chosen);
        }
        let (batch, length) = (sequences.len(), sequences.first().map_or(0, Vec::len));
        let sequences = Tensor::from_vec(sequences.concat(), (batch, length), &Device::Cpu)?;
        let mut outputs = Tensors::from([("sequences".to_owned(), sequences)]);
        if self.output_logits {
            outputs.insert("logits".to_owned(), Tensor::stack(&kept, 1)?);
        }
        Ok(outputs)
    }

    /// The token that follows `sequence`, whose first `start` are the prompt.
    fn choose(
        &self,
        item: usize,
        sequence: &[i64],
        start: usize,
        mut row: Vec<f32>,
        rule: &dyn Fn(&[i64], &mut [f32]),
    ) -> Result<i64, SessionError> {
        let made = sequence.len() - start;
        if sequence.len() == 1
            && let Some(token) = self.forced_bos_token_id
        {
            return Ok(token);
        }
        if made + 1 == self.max_new_tokens
            && let Some(token) = self.forced_eos_token_id
        {
            return Ok(token);
        }
        if self.repetition_penalty != 1.0 {
            for token in sequence.iter().collect::<HashSet<_>>() {
                if let Some(logit) = usize::try_from(*token).ok().and_then(|token| row.get_mut(token)) {
                    *logit =
                        if *logit < 0.0 { *logit * self.repetition_penalty } else { *logit / self.repetition_penalty };
                }
            }
        }
        let mut ban = |token: i64| {
            if let Some(logit) = usize::try_from(token).ok().and_then(|token| row.get_mut(token)) {
                *logit = f32::NEG_INFINITY;
            }
        };
        let size = self.no_repeat_ngram_size;
        if size > 0 && sequence.len() + 1 >= size {
            let tail = &sequence[sequence.len() + 1 - size..];
            sequence.windows(size).filter(|run| run[..size - 1] == *tail).for_each(|run| ban(run[size - 1]));
        }
        if made < self.min_new_tokens {
            self.eos_token_id.iter().copied().for_each(&mut ban);
        }
        self.suppress_tokens.iter().copied().for_each(&mut ban);
        if made == 0 {
            self.begin_suppress_tokens.iter().copied().for_each(&mut ban);
        }
        rule(&sequence[start..], &mut row);
        match self.sampling {
            None => Ok(largest(&row) as i64),
            Some(sampling) => Ok(sampling.draw(item, made, &row)? as i64),
        }
    }
}

impl Sampling {
    /// Draws the token that sequence `item` goes on with after `made` others.
    fn draw(&self, item: usize, made: usize, row: &[f32]) -> Result<usize, SessionError> {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
        order.retain(|token| row[*token] > f32::NEG_INFINITY);
        let Some(&first) = order.first() else { return Ok(largest(row)) };
        if self.top_k > 0 {
            order.truncate(self.top_k);
        }
        let weight = |token: usize| f64::from((row[token] - row[first]) / self.temperature).exp();
        let whole: f64 = order.iter().map(|token| weight(*token)).sum();
        let mut held = 0.0;
        // the one that passes the bound still counts
        let kept = order.iter().take_while(|token| {
            let before = held;
            held += weight(**token) / whole;
            before < f64::from(self.top_p)
        });
        let kept: Vec<usize> = kept.copied().collect();
        let uniform = synthetic::uniform(&format!("sampling:{item}"), 1, self.seed, made as u64)?;
        let whole: f64 = kept.iter().map(|token| weight(*token)).sum();
        let mut left = (f64::from(uniform[0]) + 1.0) / 2.0 * whole;
        let drawn = kept.iter().find(|token| {
            left -= weight(**token);
            left < 0.0
        });
        Ok(*drawn.or(kept.last()).unwrap_or(&first))
    }
}

/// The first of the largest.
fn largest(row: &[f32]) -> usize {
    row.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, x)| if *x > best.1 { (i, *x) } else { best }).0
}

/// The token ids of config.json, of a nested text model too.
fn config_fields(config: &Value) -> Map<String, Value> {
    let places = [Some(config), config.get("text_config"), config.get("decoder")];
    let find = |name: &str| places.iter().flatten().find_map(|place| place.get(name).filter(|id| !id.is_null()));
    CONFIG_FIELDS.iter().filter_map(|name| Some(((*name).to_owned(), find(name)?.clone()))).collect()
}

fn is_known(name: &str) -> bool {
    const READ: [&str; 14] = [
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "seed",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "suppress_tokens",
        "begin_suppress_tokens",
        "output_logits",
    ];
    let refused = REFUSED.iter().map(|(name, _)| name);
    READ.iter().chain(&CONFIG_FIELDS).chain(&NEUTRAL).chain(refused).any(|known| *known == name)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::session::{Engine, Unobserved};

    fn read(arguments: Value, generation_config: Option<Value>, config: Value) -> Result<Generation, SessionError> {
        let spec = ModelSpec {
            family: "gpt2".into(),
            class: "GPT2LMHeadModel".into(),
            config,
            extra_configs: generation_config
                .map(|file| ("generation_config.json".to_owned(), file))
                .into_iter()
                .collect(),
            dtype: DType::F32,
            device: Device::Cpu,
            engine: Engine::Roofbench,
        };
        let arguments = arguments.as_object().cloned().unwrap_or_default();
        Generation::read(&spec, &Call { method: "generate".into(), arguments, ..Default::default() }, 4, &["language"])
    }

    fn message(arguments: Value, generation_config: Option<Value>) -> String {
        read(arguments, generation_config, json!({})).err().map(|error| error.to_string()).unwrap_or_default()
    }

    /// Logits that follow from the last token alone: `table[token]`.
    fn run(generation: &Generation, prompt: &[Vec<i64>], table: &[[f32; 4]]) -> (Vec<Vec<i64>>, Vec<Phase>) {
        struct Phases(Vec<Phase>, Vec<i64>);
        impl Observer for Phases {
            fn end(&mut self, phase: Phase) {
                self.0.push(phase);
            }
            fn tokens(&mut self, tokens: &[i64]) {
                self.1.extend(tokens);
            }
        }
        let mut phases = Phases(Vec::new(), Vec::new());
        let outputs = generation.run(prompt, &mut phases, |tokens| {
            let last: Vec<i64> = match tokens {
                Some(tokens) => tokens.to_vec(),
                None => prompt.iter().map(|row| row[row.len() - 1]).collect(),
            };
            let rows: Vec<f32> = last.iter().flat_map(|token| table[*token as usize]).collect();
            Ok(Tensor::from_vec(rows, (last.len(), 4), &Device::Cpu)?)
        });
        let sequences = outputs.unwrap()["sequences"].to_vec2::<i64>().unwrap();
        let streamed: usize = sequences.iter().zip(prompt).map(|(all, prompt)| all.len() - prompt.len()).sum();
        assert_eq!(phases.1.len(), streamed);
        (sequences, phases.0)
    }

    /// The next token is one more, and 3 ends.
    const COUNTING: [[f32; 4]; 4] = [[0., 9., 5., 1.], [0., 1., 9., 5.], [5., 1., 0., 9.], [9., 1., 0., 5.]];

    fn plain(max_new_tokens: usize) -> Generation {
        let file = json!({"eos_token_id": 3, "pad_token_id": 0});
        read(json!({"max_new_tokens": max_new_tokens}), Some(file), json!({})).unwrap()
    }

    #[test]
    fn call_then_generation_config_then_config() {
        let file = json!({"eos_token_id": [7, 8], "max_length": 10, "top_k": 5, "do_sample": true, "temperature": 0.5});
        let read_with = |arguments| read(arguments, Some(file.clone()), json!({"eos_token_id": 1})).unwrap();
        let generation = read_with(json!({}));
        assert_eq!((generation.max_new_tokens, &generation.eos_token_id[..]), (6, &[7, 8][..]));
        assert_eq!(generation.pad_token_id, 7);
        let sampling = Sampling { temperature: 0.5, top_k: 5, top_p: 1.0, seed: 0 };
        assert_eq!(generation.sampling, Some(sampling));
        let generation = read_with(json!({"max_new_tokens": 3, "do_sample": false, "eos_token_id": 9}));
        assert_eq!((generation.max_new_tokens, generation.sampling, generation.positions(4)), (3, None, 6));
        assert_eq!(generation.eos_token_id, [9]);
        let nested = json!({"text_config": {"eos_token_id": 2, "pad_token_id": null}});
        let generation = read(json!({}), None, nested).unwrap();
        assert_eq!((generation.max_new_tokens, generation.eos_token_id), (20, vec![2]));
    }

    #[test]
    fn beams_of_a_checkpoint_become_a_greedy_choice() {
        let mut spec = ModelSpec::new("bart", "BartForConditionalGeneration", json!({}));
        let mut arguments = Arguments::new();
        assert_eq!((without_beams(&spec, &mut arguments), arguments.len()), (None, 0));
        spec.extra_configs.insert("generation_config.json".to_owned(), json!({"num_beams": 4}));
        let mut asked: Arguments = [("num_beams".to_owned(), 2.into())].into_iter().collect();
        assert_eq!((without_beams(&spec, &mut asked), &asked["num_beams"]), (None, &json!(2)));
        assert!(without_beams(&spec, &mut arguments).is_some_and(|line| line.contains("4 beams")));
        assert_eq!(arguments["num_beams"], 1);
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let error = message(json!({}), Some(json!({"num_beams": 4})));
        assert_eq!(error, "input `num_beams`: is 4, which is not supported; pass num_beams = 1");
        assert_eq!(message(json!({"num_beams": 1, "bad_words_ids": null}), Some(json!({"num_beams": 4}))), "");
        assert_eq!(message(json!({"language": "en"}), None), "");
        assert!(message(json!({"max_tokens": 4}), None).starts_with("input `max_tokens`: is no argument"));
        assert!(message(json!({"max_length": 4}), None).contains("leaves room for no token after 4 of the prompt"));
        assert!(message(json!({"max_new_tokens": -1}), None).starts_with("input `max_new_tokens`: (generation): "));
        let cold = json!({"max_new_tokens": 1, "do_sample": true, "temperature": 0.0});
        assert_eq!(message(cold, None), "input `temperature`: is 0, expected a positive number");
    }

    #[test]
    fn a_sequence_ends_at_its_end_token_and_is_padded() {
        let (sequences, phases) = run(&plain(5), &[vec![0], vec![1]], &COUNTING);
        assert_eq!(sequences, [[0, 1, 2, 3], [1, 2, 3, 0]]);
        assert_eq!(phases, [Phase::Prefill, Phase::Decode, Phase::Decode]);
        let (sequences, _) = run(&plain(2), &[vec![0]], &COUNTING);
        assert_eq!(sequences, [[0, 1, 2]]);
    }

    #[test]
    fn lengths_and_bans() {
        let (sequences, _) = run(&Generation { min_new_tokens: 4, ..plain(4) }, &[vec![0]], &COUNTING);
        assert_eq!(sequences, [[0, 1, 2, 0, 1]]); // after 2 the end is the likeliest, and then 0
        let (sequences, _) = run(&Generation { suppress_tokens: vec![1], ..plain(1) }, &[vec![0]], &COUNTING);
        assert_eq!(sequences, [[0, 2]]);
        let first = Generation { begin_suppress_tokens: vec![2], ..plain(2) };
        assert_eq!(run(&first, &[vec![1, 1]], &COUNTING).0, [[1, 1, 3]]);
        assert_eq!(run(&Generation { forced_bos_token_id: Some(2), ..plain(1) }, &[vec![0]], &COUNTING).0, [[0, 2]]);
        assert_eq!(run(&Generation { forced_eos_token_id: Some(3), ..plain(1) }, &[vec![0]], &COUNTING).0, [[0, 3]]);
    }

    #[test]
    fn a_class_has_the_last_word() {
        // no new token comes twice
        let rule = |made: &[i64], row: &mut [f32]| made.iter().for_each(|id| row[*id as usize] = f32::NEG_INFINITY);
        let step = |_: Option<&[i64]>| Ok(Tensor::new(&[[9f32, 8., 7., 0.]], &Device::Cpu)?);
        let outputs = plain(3).run_with(&[vec![0]], &mut Unobserved, &rule, step).unwrap();
        assert_eq!(outputs["sequences"].to_vec2::<i64>().unwrap(), [[0, 0, 1, 2]]);
    }

    #[test]
    fn repetition_is_made_less_likely_or_impossible() {
        let penalty = Generation { repetition_penalty: 10.0, ..plain(1) };
        assert_eq!(run(&penalty, &[vec![1, 0]], &COUNTING).0, [[1, 0, 2]]); // 9 / 10 is below 5
        let negative = [[-1.0, -1.5, -9.0, -9.0]; 4];
        assert_eq!(run(&Generation { repetition_penalty: 2.0, ..plain(1) }, &[vec![0]], &negative).0, [[0, 1]]);
        let pairs = Generation { no_repeat_ngram_size: 2, ..plain(1) };
        assert_eq!(run(&pairs, &[vec![0, 1, 0]], &COUNTING).0, [[0, 1, 0, 2]]);
    }

    #[test]
    fn samples_follow_the_probabilities() {
        let logits = [0.0, 1.0, 2.0, f32::NEG_INFINITY];
        let count = |sampling: Sampling| {
            let mut counts = [0usize; 4];
            (0..4000).for_each(|made| counts[sampling.draw(0, made, &logits).unwrap()] += 1);
            counts.map(|count| count as f64 / 4000.0)
        };
        let all = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 1 };
        let whole: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
        for (share, logit) in count(all).into_iter().zip(logits) {
            assert!((share - f64::from(logit).exp() / whole).abs() < 0.03, "{share} of {logit}");
        }
        assert_eq!(count(Sampling { top_k: 1, ..all })[2], 1.0);
        assert_eq!(count(Sampling { top_p: 0.6, ..all })[2], 1.0); // 0.67 of the probability
        let two = count(Sampling { top_p: 0.7, ..all });
        assert!(two[0] == 0.0 && two[1] > 0.2, "{two:?}");
        assert!(count(Sampling { temperature: 0.2, ..all })[2] > 0.98);
        let draw =
            |seed, item| (0..20).map(|made| Sampling { seed, ..all }.draw(item, made, &logits).unwrap()).collect();
        let drawn: Vec<usize> = draw(1, 0);
        assert_eq!(drawn, draw(1, 0));
        assert_ne!(drawn, draw(2, 0));
        assert_ne!(drawn, draw(1, 1));
    }

    #[test]
    fn logits_are_kept_as_they_came() {
        let generation = Generation { output_logits: true, suppress_tokens: vec![1], ..plain(2) };
        let row = Tensor::new(&[[0f32, 9., 5., 1.]], &Device::Cpu).unwrap();
        let outputs = generation.run(&[vec![0]], &mut Unobserved, |_| Ok(row.clone())).unwrap();
        assert_eq!(outputs["logits"].to_vec3::<f32>().unwrap(), [[[0., 9., 5., 1.], [0., 9., 5., 1.]]]);
        assert_eq!(outputs["sequences"].to_vec2::<i64>().unwrap(), [[0, 2, 2]]);
        let ragged = generation.run(&[vec![0], vec![0, 1]], &mut Unobserved, |_| Ok(row.clone()));
        assert!(ragged.unwrap_err().to_string().contains("different lengths"));
    }
}
