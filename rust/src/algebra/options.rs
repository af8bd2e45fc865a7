//! The options that computations with adapters share.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::entrywise;
use crate::error::{Error, Result};
use crate::tensor::dtype::Dtype;

/// How a result is written.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Writing {
    /// The name of the format; PEFT's if there is none.
    pub to: Option<String>,
    /// The element type of the factors; the widest of the inputs' if it is `auto` or none.
    pub dtype: Option<String>,
    /// Whether files of an adapter that is there already may be replaced.
    pub overwrite: bool,
    /// Worker threads; one for each core if there is no number.
    pub threads: Option<usize>,
    /// Whether everything is computed and nothing written.
    pub dry_run: bool,
    /// Whether it is left to the system when the files come to the disk.
    pub unsynced: bool,
}

impl Writing {
    /// The name of the format.
    ///
    /// # Errors
    /// [`Error::Argument`] never by itself; a conversion knows the formats.
    pub(crate) fn target(&self) -> Result<&str> {
        Ok(self.to.as_deref().unwrap_or("peft"))
    }

    /// The element type that was asked for.
    ///
    /// # Errors
    /// [`Error::Argument`] for one that factors are not written in.
    pub(crate) fn dtype(&self) -> Result<Option<Dtype>> {
        let name = self.dtype.as_deref().filter(|name| *name != "auto");
        name.map(crate::convert::element_type).transpose()
    }
}

/// What methods take beside weights.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct MethodOptions {
    /// Where on the way from the first to the second (slerp).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub t: Option<f64>,
    /// What the sum is multiplied by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lambda: Option<f64>,
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
}

impl MethodOptions {
    /// As JSON.
    pub(crate) fn plain(&self) -> Value {
        serde_json::to_value(self).expect("plain data")
    }

    /// A number within its domain.
    ///
    /// # Errors
    /// [`Error::Argument`] for one outside of it.
    pub(crate) fn number(
        &self,
        name: &str,
        value: Option<f64>,
        default: f64,
        is_valid: impl Fn(f64) -> bool,
    ) -> Result<f64> {
        let value = value.unwrap_or(default);
        match is_valid(value) {
            true => Ok(value),
            false => Err(Error::Argument(format!("the option {name} is {value}"))),
        }
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

    /// The share of elements that is kept.
    ///
    /// # Errors
    /// [`Error::Argument`] for 0 and above 1.
    pub(crate) fn density(&self) -> Result<f64> {
        self.number("density", self.density, 1.0, |density| density > 0.0 && density <= 1.0)
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
