//! Alias rules, compiled for one class.

use regex::Regex;

use super::{AliasRule, AliasScope, WeightsError};

/// The rules that are for one class, in order.
#[derive(Debug)]
pub(super) struct Aliases(Vec<(Regex, Option<&'static str>)>);

impl Aliases {
    pub(super) fn compile(rules: &[AliasRule], class: &str) -> Result<Self, WeightsError> {
        let scope = AliasScope::of(class);
        let for_class = rules.iter().filter(|rule| match rule.applies {
            AliasScope::Always => true,
            AliasScope::Class(name) => name == class,
            applies => applies == scope,
        });
        let compiled = for_class.map(|rule| match Regex::new(rule.pattern) {
            Ok(regex) => Ok((regex, rule.replacement)),
            Err(source) => Err(WeightsError::Rule { pattern: rule.pattern.to_owned(), source: Box::new(source) }),
        });
        compiled.collect::<Result<_, _>>().map(Self)
    }

    /// What a model calls the tensor that a file calls `name`; `None` when it is dropped.
    pub(super) fn apply(&self, name: &str) -> Option<String> {
        self.0.iter().try_fold(name.to_owned(), |name, (regex, replacement)| match replacement {
            Some(replacement) => Some(regex.replace(&name, *replacement).into_owned()),
            None => (!regex.is_match(&name)).then_some(name),
        })
    }
}

impl AliasScope {
    /// [`AliasScope::Base`] for a class that ends in `Model` and names no head before it (`GPT2LMHeadModel` does),
    /// [`AliasScope::Head`] for any other.
    pub fn of(class: &str) -> Self {
        match class.strip_suffix("Model") {
            Some(stem) if !stem.contains("For") && !stem.contains("Head") => Self::Base,
            _ => Self::Head,
        }
    }
}
