//! The methods by their names, and what each takes.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// What the methods take beside weights and a seed.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// The share of elements that is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub density: Option<f64>,
    /// How far keep probabilities lie from the density (DELLA).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epsilon: Option<f64>,
    /// The share of the largest elements that is dropped (breadcrumbs).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gamma: Option<f64>,
    /// What the result is multiplied by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lambda: Option<f64>,
    /// Whether sums are divided by the weights of those that agree (methods that elect a sign).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub normalize: Option<bool>,
    /// The share of positions that is kept, those of the largest variance (SCE).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub select_topk: Option<f64>,
}

/// The methods, with the options that each takes.
pub const METHODS: [(&str, &[&str]); 9] = [
    ("ties", &["density", "normalize", "lambda"]),
    ("dare_linear", &["density", "lambda"]),
    ("dare_ties", &["density", "normalize", "lambda"]),
    ("della", &["density", "epsilon", "normalize", "lambda"]),
    ("della_linear", &["density", "epsilon", "lambda"]),
    ("breadcrumbs", &["density", "gamma", "lambda"]),
    ("breadcrumbs_ties", &["density", "gamma", "normalize", "lambda"]),
    ("magnitude_prune", &["density", "lambda"]),
    ("sce", &["select_topk", "density", "lambda"]),
];

/// Which elements of an update are kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Trim {
    /// The ⌊density·numel⌋ largest.
    Largest { density: f64 },
    /// Those after the ⌊gamma·numel⌋ largest.
    Middle { density: f64, gamma: f64 },
    /// Each with the probability density, divided by it.
    Random { density: f64 },
    /// The same with probabilities by the rank in the row.
    Ranked { density: f64, epsilon: f64 },
    /// The positions of the largest variance over all updates, of those where it is not zero.
    Variance { share: f64 },
}

/// What becomes of the elements that are kept at one position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Join {
    /// Σwx.
    Sum,
    /// The sum over those whose wx has the sign of Σwx; divided by Σ|w| over them.
    Elect { normalize: bool },
    /// The sum over those whose x has the sign of Σx, without weights, divided by how many these are:
    /// PEFT's rule.
    Count,
    /// The mean over those that have the sign of Σx, weighed by each update's mean square.
    Energies,
}

/// A method with its parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Method {
    pub(super) trim: Trim,
    pub(super) join: Join,
    pub(super) lambda: f64,
}

impl Method {
    /// Whether there is an entry-wise method of that name.
    pub fn is_known(name: &str) -> bool {
        METHODS.iter().any(|(known, _)| *known == name)
    }

    /// The method of that name; `density` and `select_topk` are 1 where there is none, `gamma` 0.01,
    /// `epsilon` 0.15, `lambda` 1, and `normalize` holds.
    ///
    /// # Errors
    /// [`Error::Argument`] for a name that is none, options that the method does not take, and numbers
    /// outside of their domain.
    pub fn new(name: &str, options: &Options) -> Result<Self> {
        let Some((_, known)) = METHODS.iter().find(|(known, _)| *known == name) else {
            let names: Vec<&str> = METHODS.iter().map(|(name, _)| *name).collect();
            return Err(Error::Argument(format!(
                "{name:?} is no entry-wise method; there are {}",
                names.join(", ")
            )));
        };
        let given = serde_json::to_value(options).expect("plain data");
        let Value::Object(given) = given else { unreachable!("a struct is an object") };
        if let Some(other) = given.keys().find(|key| !known.contains(&key.as_str())) {
            return Err(Error::Argument(format!(
                "the method {name} takes no option {other:?}; it takes {}",
                known.join(", ")
            )));
        }
        if options.select_topk.is_some() && options.density.is_some() {
            return Err(Error::Argument(format!(
                "select_topk and density are one option of the method {name}; give one of them"
            )));
        }
        let share = |name: &str, value: Option<f64>| match value.unwrap_or(1.0) {
            value if value > 0.0 && value <= 1.0 => Ok(value),
            value => Err(Error::Argument(format!(
                "the option {name} is {value}; it is the share that is kept, above 0 and at most 1"
            ))),
        };
        let density = share("density", options.density)?;
        let trim = match name {
            "ties" | "magnitude_prune" => Trim::Largest { density },
            "dare_linear" | "dare_ties" => Trim::Random { density },
            "breadcrumbs" | "breadcrumbs_ties" => match options.gamma.unwrap_or(0.01) {
                gamma if (0.0..1.0).contains(&gamma) => Trim::Middle { density, gamma },
                gamma => {
                    return Err(Error::Argument(format!(
                        "the option gamma is {gamma}; it is the share of the largest elements that is \
                         dropped, from 0 to below 1"
                    )));
                }
            },
            "della" | "della_linear" => {
                let epsilon = options.epsilon.unwrap_or(0.15);
                let (least, most) = (density - epsilon, density + epsilon);
                // The sums of decimal fractions may lie a rounding above 1.
                if !(epsilon >= 0.0 && least > 0.0 && most <= 1.0 + 1e-12) {
                    return Err(Error::Argument(format!(
                        "the options density {density} and epsilon {epsilon} make keep probabilities from \
                         {least} to {most}; they have to be above 0 and at most 1"
                    )));
                }
                Trim::Ranked { density, epsilon }
            }
            _ => match options.select_topk {
                Some(_) => Trim::Variance { share: share("select_topk", options.select_topk)? },
                None => Trim::Variance { share: density },
            },
        };
        let normalize = options.normalize.unwrap_or(true);
        let join = match name {
            "sce" => Join::Energies,
            "dare_linear" | "della_linear" | "breadcrumbs" | "magnitude_prune" => Join::Sum,
            _ => Join::Elect { normalize },
        };
        let lambda = options.lambda.unwrap_or(1.0);
        if !lambda.is_finite() {
            return Err(Error::Argument(format!("the option lambda is {lambda}")));
        }
        Ok(Self { trim, join, lambda })
    }

    /// The same with PEFT's rule for those that elect a sign: weights have no part in the election, and
    /// sums are divided by how many agree.
    #[must_use]
    pub fn counting(self) -> Self {
        let join = if matches!(self.join, Join::Elect { .. }) { Join::Count } else { self.join };
        Self { join, ..self }
    }

    /// Whether weights of the adapters have a part in it.
    pub fn takes_weights(&self) -> bool {
        self.join != Join::Energies
    }

    /// Whether an element's fate depends on the others of its row.
    pub fn looks_at_rows(&self) -> bool {
        matches!(self.trim, Trim::Ranked { .. })
    }

    /// Whether something of a whole tensor has to be known, for which its tiles are looked at before:
    /// tiles of the updates' rows, or of their columns.
    pub fn needs_passes(&self, are_transposed: bool) -> bool {
        !self.is_random() || (are_transposed && self.looks_at_rows())
    }

    /// Whether it depends on a seed.
    pub fn is_random(&self) -> bool {
        matches!(self.trim, Trim::Random { .. } | Trim::Ranked { .. })
    }
}

/// ⌊share·count⌋.
pub(super) fn part_of(share: f64, count: u64) -> u64 {
    ((share * count as f64).floor() as u64).min(count)
}
