//! What methods that make one update of several take beside weights and a seed, and the names that PEFT has
//! for some of them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::coefficients::Numbers;
use crate::entrywise;
use crate::error::{Error, Result};

/// PEFT's names for methods that have another one here. Those that end with `_svd` work on the updates
/// themselves, as all methods do here, and cut what they make to a rank where an adapter is to hold it.
pub(crate) const NAMES_OF_PEFT: [(&str, &str); 6] = [
    ("ties_svd", "ties"),
    ("dare_linear_svd", "dare_linear"),
    ("dare_ties_svd", "dare_ties"),
    ("magnitude_prune_svd", "magnitude_prune"),
    ("cat", "linear"),
    ("svd", "linear"),
];

/// The name that a method has here.
pub(crate) fn own_name(name: &str) -> &str {
    NAMES_OF_PEFT.iter().find(|(other, _)| *other == name).map_or(name, |(_, own)| *own)
}

/// What methods take beside weights and a seed.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct MethodOptions {
    /// The share of elements that is kept (methods that look at each element).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub density: Option<f64>,
    /// How far keep probabilities lie from the density (della, della_linear).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epsilon: Option<f64>,
    /// The share of the largest elements that is dropped (breadcrumbs, breadcrumbs_ties).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gamma: Option<f64>,
    /// Whether sums are divided by the weights of those that agree (methods that elect a sign).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub normalize: Option<bool>,
    /// The share of positions that is kept, those of the largest variance (sce).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub select_topk: Option<f64>,
    /// What the result is multiplied by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lambda: Option<f64>,
    /// Where on the way from the first to the second (slerp).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub t: Option<f64>,
    /// Steps at most (karcher).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_iter: Option<u64>,
    /// The length of a step that is none any more (karcher).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tol: Option<f64>,
    /// The length of the mean direction below which the directions cancel (multislerp).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eps: Option<f64>,
    /// The merge in the basis that the updates share (knots, core_space).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub merge: Option<String>,
    /// Singular triplets of each adapter at most (tsv_m).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub k: Option<u64>,
}

impl MethodOptions {
    /// As JSON.
    pub(crate) fn plain(&self) -> Value {
        serde_json::to_value(self).expect("plain data")
    }

    /// Checks that there are but some of them, and a finite factor on the result.
    ///
    /// # Errors
    /// [`Error::Argument`] for others; `what` says what does not take them.
    pub(crate) fn check_known(&self, what: &str, known: &[&str]) -> Result<()> {
        let Value::Object(given) = self.plain() else { unreachable!("a struct is an object") };
        let is_known = |name: &str| name == "lambda" || known.contains(&name);
        if let Some(other) = given.keys().find(|name| !is_known(name)) {
            let mut all: Vec<&str> =
                known.iter().copied().filter(|name| *name != "lambda").collect();
            all.push("lambda");
            return Err(Error::Argument(format!(
                "{what} takes no option {other:?}; it takes {}",
                all.join(", ")
            )));
        }
        match self.lambda() {
            lambda if lambda.is_finite() => Ok(()),
            lambda => Err(Error::Argument(format!("the option lambda is {lambda}"))),
        }
    }

    /// What the result is multiplied by.
    pub(crate) fn lambda(&self) -> f64 {
        self.lambda.unwrap_or(1.0)
    }

    /// What methods take of them that need inner products alone.
    pub(crate) fn numbers(&self) -> Numbers {
        Numbers { t: self.t, max_iter: self.max_iter, tol: self.tol, eps: self.eps }
    }

    /// What entry-wise methods take of them, but for the result's factor.
    pub(crate) fn entrywise(&self) -> entrywise::Options {
        entrywise::Options {
            density: self.density,
            epsilon: self.epsilon,
            gamma: self.gamma,
            lambda: None,
            normalize: self.normalize,
            select_topk: self.select_topk,
        }
    }

    /// The singular triplets of each adapter.
    ///
    /// # Errors
    /// [`Error::Argument`] for none of them.
    pub(crate) fn k(&self) -> Result<Option<usize>> {
        match self.k {
            Some(0) => {
                Err(Error::Argument("the option k is 0, which would leave nothing".to_owned()))
            }
            k => Ok(k.map(|k| usize::try_from(k).unwrap_or(usize::MAX))),
        }
    }
}
