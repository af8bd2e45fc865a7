//! The options that computations with adapters share.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::weights::Weight;
use crate::coefficients::Gram;
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
}

/// The methods that need inner products alone, with the options that each takes.
const METHODS: [(&str, &[&str]); 9] = [
    ("linear", &["lambda"]),
    ("normalized", &["lambda"]),
    ("centroid", &["lambda"]),
    ("slerp", &["t", "lambda"]),
    ("nuslerp", &["lambda"]),
    ("karcher", &["max_iter", "tol", "lambda"]),
    ("multislerp", &["eps", "lambda"]),
    ("model_stock", &["lambda"]),
    ("projection", &["lambda"]),
];

impl MethodOptions {
    /// As JSON.
    pub(crate) fn plain(&self) -> Value {
        serde_json::to_value(self).expect("plain data")
    }

    /// The method of that name with these options, for so many adapters.
    ///
    /// # Errors
    /// [`Error::Argument`] for a name that is none, options that it does not take, numbers outside of
    /// their domain, and another number of adapters than it is for.
    pub(crate) fn gram(&self, name: &str, count: usize, has_weights: bool) -> Result<Method> {
        let Some((_, known)) = METHODS.iter().find(|(known, _)| *known == name) else {
            let names: Vec<&str> = METHODS.iter().map(|(name, _)| *name).collect();
            return Err(Error::Argument(format!(
                "method is {name:?}; there are {}",
                names.join(", ")
            )));
        };
        let Value::Object(given) = self.plain() else { unreachable!("a struct is an object") };
        if let Some(other) = given.keys().find(|key| !known.contains(&key.as_str())) {
            return Err(Error::Argument(format!(
                "the method {name} takes no option {other:?}; it takes {}",
                known.join(", ")
            )));
        }
        let number = |name: &str, value: Option<f64>, default: f64, is_valid: fn(f64) -> bool| {
            let value = value.unwrap_or(default);
            match is_valid(value) {
                true => Ok(value),
                false => Err(Error::Argument(format!("the option {name} is {value}"))),
            }
        };
        let positive = |value: f64| value > 0.0 && value.is_finite();
        let needs = |least: usize, most: usize| match (least..=most).contains(&count) {
            true => Ok(()),
            false => Err(Error::Argument(format!(
                "the method {name} is for {} adapters, and there {} {count}",
                if least == most { least.to_string() } else { format!("at least {least}") },
                if count == 1 { "is" } else { "are" }
            ))),
        };
        let takes_no_weights = || match has_weights {
            false => Ok(()),
            true => Err(Error::Argument(format!("the method {name} takes no weights"))),
        };
        let gram = match name {
            "linear" => Gram::Linear,
            "normalized" => Gram::Normalized,
            "centroid" => {
                takes_no_weights()?;
                Gram::Centroid
            }
            "slerp" => {
                needs(2, 2)?;
                takes_no_weights()?;
                Gram::Slerp { t: number("t", self.t, 0.5, |t| (0.0..=1.0).contains(&t))? }
            }
            "nuslerp" => {
                needs(2, 2)?;
                Gram::Nuslerp
            }
            "karcher" => Gram::Karcher {
                steps: self.max_iter.unwrap_or(1000),
                tolerance: number("tol", self.tol, 1e-12, positive)?,
            },
            "multislerp" => {
                needs(2, usize::MAX)?;
                Gram::Multislerp { epsilon: number("eps", self.eps, 1e-8, positive)? }
            }
            "model_stock" => {
                needs(2, usize::MAX)?;
                takes_no_weights()?;
                Gram::ModelStock
            }
            _ => {
                needs(2, usize::MAX)?;
                takes_no_weights()?;
                Gram::Projection
            }
        };
        let lambda = number("lambda", self.lambda, 1.0, f64::is_finite)?;
        Ok(Method { gram, lambda })
    }
}

/// A method, and what its result is multiplied by.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Method {
    gram: Gram,
    lambda: f64,
}

impl Method {
    /// The sum of all with weights as they are.
    pub const LINEAR: Self = Self { gram: Gram::Linear, lambda: 1.0 };

    /// The coefficients of updates; `products` are their inner products, where they are needed.
    pub fn coefficients(
        &self,
        products: impl FnOnce() -> crate::linalg::Matrix,
        weights: &[f64],
    ) -> Vec<f64> {
        let mut found = match self.gram {
            Gram::Linear | Gram::Normalized | Gram::Centroid => {
                self.gram.coefficients(&crate::linalg::Matrix::zeros(0, 0), weights)
            }
            _ => self.gram.coefficients(&products(), weights),
        };
        found.iter_mut().for_each(|value| *value *= self.lambda);
        found
    }

    /// Checks the weights of each module for methods that divide by their sum.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub fn check_weights(&self, weights: &[Weight], modules: &[String]) -> Result<()> {
        let divides = matches!(
            self.gram,
            Gram::Normalized | Gram::Nuslerp | Gram::Karcher { .. } | Gram::Multislerp { .. }
        );
        if !divides {
            return Ok(());
        }
        for module in modules {
            let own: Vec<f64> = weights.iter().map(|weight| weight.of(module)).collect();
            let sum: f64 = own.iter().sum();
            if own.iter().any(|weight| *weight < 0.0) || sum <= 0.0 {
                return Err(Error::Argument(format!(
                    "the weights {own:?} are divided by their sum, for which none may be negative \
                     and one has to be above zero ({module}); the method linear takes any"
                )));
            }
        }
        Ok(())
    }
}
