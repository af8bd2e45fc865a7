//! The weights of adapters under a plan's strategy, module by module.

use std::borrow::Cow;

use super::options::{Options, Strategy};
use crate::adapter::Adapter;
use crate::coefficients::Gram;
use crate::error::{Error, Result, agree, counted};
use crate::linalg::Matrix;
use crate::weights::Weight;

/// What the updates of each module are multiplied by.
#[derive(Debug)]
pub(super) struct ModuleWeights {
    /// What was given for each adapter.
    given: Vec<Weight>,
    /// The method that makes coefficients of the weights of one module, where it needs no more.
    method: Option<Gram>,
    /// The factor on all of its coefficients.
    lambda: f64,
    /// Whether the updates are taken out.
    is_subtracted: bool,
}

impl ModuleWeights {
    /// The weights of so many adapters.
    ///
    /// # Errors
    /// [`Error::Argument`] for weights that do not fit the strategy.
    pub fn of(options: &Options, adapters: usize) -> Result<Self> {
        if adapters == 0 {
            return Err(Error::Argument("no adapter was given; a merge needs at least one".into()));
        }
        if let Some(weights) = &options.weights {
            if matches!(options.strategy, Strategy::Sequential | Strategy::Average) {
                return Err(Error::Argument(format!(
                    "weights were given, but only the strategy \"weighted\" uses them, or a method such \
                     as ties or linear, not {}",
                    options.strategy.name()
                )));
            }
            if weights.len() != adapters {
                return Err(Error::Argument(format!(
                    "{} {} given for {}; give as many weights as adapters",
                    counted(weights.len(), "weight"),
                    agree(weights.len(), "was", "were"),
                    counted(adapters, "adapter"),
                )));
            }
            weights.iter().try_for_each(Weight::check_numbers)?;
        }
        let one = match options.strategy {
            Strategy::Average => 1.0 / adapters as f64,
            _ => 1.0,
        };
        let given = options.weights.clone().unwrap_or_else(|| vec![Weight::All(one); adapters]);
        let method = options.gram(adapters)?.filter(Gram::needs_no_products);
        let lambda = if method.is_some() { options.lambda() } else { 1.0 };
        Ok(Self { given, method, lambda, is_subtracted: options.subtract })
    }

    /// Checks them for all modules of the adapters.
    ///
    /// # Errors
    /// [`Error::Argument`] for patterns that fit none, and weights whose sum is no divisor.
    pub fn check<'a>(
        &self,
        options: &Options,
        adapters: impl Iterator<Item = &'a Adapter>,
    ) -> Result<()> {
        let is_plain = |weight: &Weight| matches!(weight, Weight::All(_));
        let method = options.gram(self.given.len())?;
        if self.given.iter().all(is_plain) {
            // They are the same in every module.
            let Some(method) = method else { return Ok(()) };
            return method.check_weights(&self.of_module(""), "in every module");
        }
        let names: Vec<Cow<'_, str>> = adapters.flat_map(names_of).collect();
        for weight in &self.given {
            weight.check_patterns(names.iter().map(|name| &**name))?;
        }
        let Some(method) = method else { return Ok(()) };
        names.iter().try_for_each(|name| method.check_weights(&self.of_module(name), name))
    }

    /// What was given for each adapter, in a module.
    pub fn of_module(&self, module: &str) -> Vec<f64> {
        self.given.iter().map(|weight| weight.of(module)).collect()
    }

    /// The factor on what an adapter does to a module.
    pub fn factor(&self, adapter: usize, module: &str) -> f64 {
        let factor = self.factor_of_merge(adapter, module);
        if self.is_subtracted { -factor } else { factor }
    }

    /// The same where it is merged.
    fn factor_of_merge(&self, adapter: usize, module: &str) -> f64 {
        let weight = match &self.method {
            Some(method) => {
                method.coefficients(&Matrix::zeros(0, 0), &self.of_module(module))[adapter]
            }
            None => self.given[adapter].of(module),
        };
        weight * self.lambda
    }

    /// Whether an adapter's weight is 0 in all of its modules.
    pub fn is_zero(&self, position: usize, adapter: &Adapter) -> bool {
        match &self.given[position] {
            Weight::All(weight) => *weight == 0.0,
            weight => names_of(adapter).all(|name| weight.of(&name) == 0.0),
        }
    }

    /// As plans and reports tell them: as they were given, or where that is the same in all modules, what
    /// the strategy makes of them.
    pub fn told(&self) -> Vec<Weight> {
        let positions = 0..self.given.len();
        match self.given.iter().all(|weight| matches!(weight, Weight::All(_))) {
            true => {
                positions.map(|adapter| Weight::All(self.factor_of_merge(adapter, ""))).collect()
            }
            false => self.given.clone(),
        }
    }
}

/// The names by which an adapter's modules are weighed, those of parameters that were trained whole among
/// them.
fn names_of(adapter: &Adapter) -> impl Iterator<Item = Cow<'_, str>> {
    let saved = adapter.saved().iter().map(|saved| saved.path.as_str());
    let rows = adapter.trained_rows().iter().map(|rows| rows.path.as_str());
    let modules = adapter.modules().values().map(|module| module.title());
    modules.chain(saved.chain(rows).map(|path| Cow::Borrowed(module_of(path))))
}

/// The module of a parameter.
pub(super) fn module_of(parameter: &str) -> &str {
    parameter.strip_suffix(".weight").unwrap_or(parameter)
}
