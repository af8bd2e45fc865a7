//! The weight of each adapter in each module: a number, or numbers by patterns of module names.

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What was given for one adapter.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum Weight {
    /// The same for all modules.
    All(f64),
    /// By patterns of module names; the first that fits counts, and what none fits has 1.
    ByModule(IndexMap<String, f64>),
}

impl Weight {
    /// The weight of a module.
    pub(crate) fn of(&self, module: &str) -> f64 {
        match self {
            Self::All(weight) => *weight,
            Self::ByModule(patterns) => {
                let found = patterns.iter().find(|(pattern, _)| fits(pattern, module));
                found.map_or(1.0, |(_, weight)| *weight)
            }
        }
    }

    /// Checks that all numbers are finite.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub(crate) fn check_numbers(&self) -> Result<()> {
        let finite = |weight: &f64| match weight.is_finite() {
            true => Ok(()),
            false => Err(Error::Argument(format!("the weight {weight} is not a finite number"))),
        };
        match self {
            Self::All(weight) => finite(weight),
            Self::ByModule(patterns) => patterns.values().try_for_each(finite),
        }
    }

    /// Checks that each pattern fits a module.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub(crate) fn check_patterns<'a>(
        &self,
        modules: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<()> {
        let Self::ByModule(patterns) = self else { return Ok(()) };
        let fits_one = |pattern: &str| modules.clone().any(|module| fits(pattern, module));
        match patterns.keys().find(|pattern| !fits_one(pattern)) {
            None => Ok(()),
            Some(pattern) => Err(Error::Argument(format!(
                "weights: no module fits the pattern {pattern:?}; * stands for any characters, ? for \
                 one, and a pattern fits whole names as \"{}\"",
                modules.clone().next().unwrap_or("model.layers.0.self_attn.q_proj")
            ))),
        }
    }
}

/// Whether a pattern with `*` and `?` is all of a name.
pub(crate) fn fits(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), name.chars().collect());
    let (mut place, mut at) = (0, 0);
    // Where the last star stood, and how far it has gone.
    let mut star: Option<(usize, usize)> = None;
    while at < name.len() {
        match pattern.get(place) {
            Some('*') => {
                star = Some((place, at));
                place += 1;
            }
            Some('?') => (place, at) = (place + 1, at + 1),
            Some(own) if *own == name[at] => (place, at) = (place + 1, at + 1),
            _ => match star {
                Some((before, from)) => {
                    star = Some((before, from + 1));
                    (place, at) = (before + 1, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern[place..].iter().all(|rest| *rest == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_whole_names() {
        let name = "model.layers.10.self_attn.q_proj";
        for pattern in ["*", name, "*.q_proj", "model.*.q_proj", "model.layers.1?.*", "*1*attn*"] {
            assert!(fits(pattern, name), "{pattern}");
        }
        for pattern in ["", "q_proj", "*.k_proj", "model.layers.?.*", "model.*.q_proj?"] {
            assert!(!fits(pattern, name), "{pattern}");
        }
        assert!(fits("**", ""));
    }

    #[test]
    fn the_first_pattern_that_fits_counts() {
        let patterns = [("*.q_proj".to_owned(), 0.5), ("model.*".to_owned(), 2.0)];
        let weight = Weight::ByModule(patterns.into_iter().collect());
        assert_eq!(weight.of("model.q_proj"), 0.5);
        assert_eq!(weight.of("model.k_proj"), 2.0);
        assert_eq!(weight.of("other"), 1.0);
        assert!(weight.check_patterns(["model.q_proj"].into_iter()).is_ok());
        assert!(weight.check_patterns(["model.k_proj"].into_iter()).is_err());
        assert!(weight.check_numbers().is_ok());
        assert!(Weight::All(f64::NAN).check_numbers().is_err());
    }
}
