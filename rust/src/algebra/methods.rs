//! The methods that make one update of several: their names, what they take, and what they do with the
//! updates of one module.

use super::dense;
use super::factored::{Grams, inner_products};
use super::joint::{Directions, Joint};
use super::merge::{Merge, Updates};
use super::ranks::Rule;
use super::raw::Raw;
use crate::coefficients::{self, Gram};
use crate::entrywise;
use crate::error::{Error, Result};
use crate::methods::{MethodOptions, own_name};
use crate::weights::Weight;

/// A method with what it was given.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Method {
    pub family: Family,
    /// What the result is multiplied by, where the family does not do so itself.
    pub lambda: f64,
    /// Whether the result has the largest rank of what goes in where no rule is given.
    pub shortens: bool,
    /// Which directions methods of singular vectors take.
    pub counts: Directions,
}

/// What a method needs of the updates.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Family {
    /// Their inner products: the result is a sum of them.
    Sum(Gram),
    /// Their singular vectors.
    Joint(Joint),
    /// Each of their elements.
    Entries(entrywise::Method),
    /// Their factors as they are stored.
    Raw(Raw),
}

/// The further methods that are computed with factors, with the options that each takes beside `lambda`.
const FACTORED: [(&str, &[&str]); 5] = [
    ("svd", &[]),
    ("knots", &["merge"]),
    ("tsv_m", &["k"]),
    ("iso_c", &[]),
    ("core_space", &["merge"]),
];

/// PEFT's, by its names.
const PEFT: [(&str, &[&str]); 11] = [
    ("linear", &[]),
    ("cat", &[]),
    ("svd", &[]),
    ("ties", &["density"]),
    ("ties_svd", &["density"]),
    ("dare_linear", &["density"]),
    ("dare_linear_svd", &["density"]),
    ("dare_ties", &["density"]),
    ("dare_ties_svd", &["density"]),
    ("magnitude_prune", &["density"]),
    ("magnitude_prune_svd", &["density"]),
];

/// Whose results are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Compat {
    /// Those that are defined here.
    #[default]
    Own,
    /// PEFT's.
    Peft,
    /// The ranks of kohya's older scripts.
    Kohya,
}

impl Compat {
    /// # Errors
    /// [`Error::Argument`] for a name that is none.
    pub fn parse(name: Option<&str>) -> Result<Self> {
        match name {
            None => Ok(Self::Own),
            Some("peft") => Ok(Self::Peft),
            Some("kohya") => Ok(Self::Kohya),
            Some(other) => Err(Error::Argument(format!(
                "compat is {other:?}; there are \"peft\", for what its add_weighted_adapter makes of \
                 the factors, and \"kohya\", for the ranks of its older resize_lora.py"
            ))),
        }
    }
}

/// What a method is for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Inputs {
    /// The number of adapters.
    pub count: usize,
    /// Whether weights were given.
    pub has_weights: bool,
    pub compat: Compat,
}

/// The options of a method, of those that its family has.
fn options_of(
    name: &str,
    families: &[&[(&'static str, &'static [&'static str])]],
) -> Option<&'static [&'static str]> {
    let mut all = families.iter().copied().flatten();
    all.find(|(known, _)| *known == name).map(|(_, options)| *options)
}

fn names(families: &[&[(&'static str, &'static [&'static str])]]) -> String {
    let all = families.iter().copied().flatten().map(|(name, _)| *name);
    all.collect::<Vec<_>>().join(", ")
}

impl Method {
    /// The sum of all with weights as they are.
    pub const LINEAR: Self = Self {
        family: Family::Sum(Gram::Linear),
        lambda: 1.0,
        shortens: false,
        counts: Directions::Numerical,
    };

    /// The method of that name with these options.
    ///
    /// # Errors
    /// [`Error::Argument`] for a name that is none, options that it does not take, numbers outside of
    /// their domain, and another number of adapters than it is for.
    pub fn parse(name: &str, options: &MethodOptions, inputs: Inputs) -> Result<Self> {
        let is_peft = inputs.compat == Compat::Peft;
        let families: &[&[(&str, &[&str])]] = match is_peft {
            true => &[&PEFT],
            false => &[&coefficients::METHODS, &FACTORED, &entrywise::METHODS],
        };
        // What PEFT's names mean here; svd is a method of both.
        let meant = if is_peft || name == "svd" { name } else { own_name(name) };
        let Some(own) = options_of(meant, families) else {
            return Err(Error::Argument(match is_peft {
                true => format!(
                    "method is {name:?}; under compat=\"peft\" there are PEFT's: {}",
                    names(families)
                ),
                false => format!(
                    "method is {name:?}; there are {}, and of PEFT's names cat, ties_svd, \
                     dare_linear_svd, dare_ties_svd, magnitude_prune_svd",
                    names(families)
                ),
            }));
        };
        let mut known = own.to_vec();
        // A merge within a method takes its own options beside.
        let merge = options.merge.as_deref().unwrap_or("ties");
        if own.contains(&"merge") {
            known.extend(Merge::options(merge)?);
        }
        options.check_known(&format!("the method {name}"), &known)?;
        let family = match meant {
            _ if is_peft => of_peft(name, options, inputs)?,
            "knots" => Family::Joint(Joint::Knots(Merge::parse(merge, options, inputs)?)),
            "core_space" => Family::Joint(Joint::CoreSpace(Merge::parse(merge, options, inputs)?)),
            "tsv_m" => Family::Joint(Joint::TsvM { k: options.k()? }),
            "iso_c" => Family::Joint(Joint::IsoC),
            "svd" => Family::Sum(Gram::Linear),
            name if entrywise::Method::is_known(name) => {
                Family::Entries(entries(name, options, inputs)?)
            }
            name => Family::Sum(gram(name, options, inputs)?),
        };
        let counts = Directions::default();
        let shortens = name == "svd" || name.ends_with("_svd");
        Ok(Self { family, lambda: options.lambda(), shortens, counts })
    }

    /// Whether it depends on a seed.
    pub fn is_random(&self) -> bool {
        match &self.family {
            Family::Entries(entries)
            | Family::Joint(
                Joint::Knots(Merge::Entries(entries)) | Joint::CoreSpace(Merge::Entries(entries)),
            ) => entries.is_random(),
            Family::Raw(raw) => raw.is_random(),
            _ => false,
        }
    }

    /// Checks that a rule for ranks fits.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub fn check_rule(&self, name: &str, rule: Option<Rule>) -> Result<()> {
        match (&self.family, rule) {
            (Family::Entries(_), None) if !self.shortens => Err(Error::Argument(format!(
                "the method {name} makes updates of full rank, which an adapter holds with a loss: give \
                 a rank (rank=, --rank), and the report has each module's error, or merge into the base \
                 with the strategy {name}, which loses nothing"
            ))),
            (Family::Entries(_), Some(Rule::Auto)) => Err(Error::Argument(format!(
                "rank is \"auto\", which drops what the rounding of the stored factors explains; the \
                 updates that the method {name} makes are of full rank, and need a number, or a rule as \
                 \"error:0.1\""
            ))),
            (
                Family::Joint(
                    Joint::Knots(Merge::Entries(_)) | Joint::CoreSpace(Merge::Entries(_)),
                ),
                Some(Rule::Auto),
            ) => Err(Error::Argument(format!(
                "rank is \"auto\", which drops what the rounding of the stored factors explains; {name} \
                 merges coordinates element by element, and which of them are kept can turn on a single \
                 rounding, so that no singular value bounds what it explains: give a number, or a rule as \
                 \"error:0.1\" (with options={{\"merge\": \"linear\"}} there is an \"auto\")"
            ))),
            _ => Ok(()),
        }
    }

    /// The same method under a rule: what rounding explains is no direction of an update under `auto`, and a
    /// sum of coordinates is the sum of the updates, whose floor is known.
    #[must_use]
    pub fn under(self, rule: Option<Rule>) -> Self {
        if rule != Some(Rule::Auto) {
            return self;
        }
        let family = match self.family {
            Family::Joint(Joint::Knots(Merge::Sum(gram)) | Joint::CoreSpace(Merge::Sum(gram))) => {
                Family::Sum(gram)
            }
            family => family,
        };
        Self { family, counts: Directions::AboveRounding, ..self }
    }

    /// Checks the weights of each module for methods that divide by their sum.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub fn check_weights(&self, weights: &[Weight], modules: &[String]) -> Result<()> {
        let gram = match &self.family {
            Family::Sum(gram)
            | Family::Joint(Joint::Knots(Merge::Sum(gram)) | Joint::CoreSpace(Merge::Sum(gram))) => {
                gram
            }
            _ => return Ok(()),
        };
        modules.iter().try_for_each(|module| {
            let own: Vec<f64> = weights.iter().map(|weight| weight.of(module)).collect();
            gram.check_weights(&own, module)
        })
    }
}

/// PEFT's method of that name.
fn of_peft(name: &str, options: &MethodOptions, inputs: Inputs) -> Result<Family> {
    if matches!(name, "cat" | "svd") {
        return Ok(Family::Sum(Gram::Linear));
    }
    // Of one adapter PEFT makes a multiple, whatever the method.
    let name = if inputs.count == 1 { "linear" } else { name };
    if name == "linear" {
        return Ok(Family::Raw(Raw::LINEAR));
    }
    let entries = entries(own_name(name), options, inputs)?;
    Ok(match name.ends_with("_svd") {
        true => Family::Entries(entries.counting()),
        false => Family::Raw(Raw::of(name, options.density.unwrap_or(1.0))),
    })
}

impl Merge {
    /// Those that need inner products, or each element.
    const NAMES: [&[(&'static str, &'static [&'static str])]; 2] =
        [&coefficients::METHODS, &entrywise::METHODS];

    /// The options that a merge takes.
    ///
    /// # Errors
    /// [`Error::Argument`] for a name that is none.
    fn options(name: &str) -> Result<&'static [&'static str]> {
        options_of(name, &Self::NAMES).ok_or_else(|| {
            Error::Argument(format!(
                "the option merge is {name:?}; there are {}",
                names(&Self::NAMES)
            ))
        })
    }

    /// The merge of that name.
    ///
    /// # Errors
    /// [`Error::Argument`].
    fn parse(name: &str, options: &MethodOptions, inputs: Inputs) -> Result<Self> {
        match entrywise::Method::is_known(name) {
            true => entries(name, options, inputs).map(Self::Entries),
            false => gram(name, options, inputs).map(Self::Sum),
        }
    }
}

/// The entry-wise method of that name; the result's factor is not its own.
fn entries(name: &str, options: &MethodOptions, inputs: Inputs) -> Result<entrywise::Method> {
    let method = entrywise::Method::new(name, &options.entrywise())?;
    match inputs.has_weights && !method.takes_weights() {
        true => Err(Error::Argument(format!(
            "the method {name} takes no weights: it finds them from the updates"
        ))),
        false => Ok(method),
    }
}

impl Gram {
    /// The coefficients of one module's updates, and the Gram matrices of all of these next to one another
    /// where they were made.
    ///
    /// # Errors
    /// [`Error::Argument`] never: the updates are of one shape.
    pub fn of(&self, of: &Updates<'_, '_>) -> Result<(Vec<f64>, Option<Grams>)> {
        if of.has_dense() || self.needs_no_products() {
            return Ok((self.coefficients_with(|| dense::products(of), of.weights), None));
        }
        let (products, grams) = inner_products(of.shape, of.updates)?;
        Ok((self.coefficients(&products, of.weights), Some(grams)))
    }
}

/// The method of that name that needs inner products alone; the result's factor is not its own.
fn gram(name: &str, options: &MethodOptions, inputs: Inputs) -> Result<Gram> {
    Gram::new(name, &options.numbers(), inputs.count, inputs.has_weights)
}
