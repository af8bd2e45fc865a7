//! Rules between two names of one parameter: the one that diffusers gives it, and the one that the
//! model's author gave it.
//!
//! A rule is a pair of templates. A template is a text in which `{i}`, `{n}` and the like stand for a
//! number, `{a}` and `{b}` for one segment between dots, `{*}` for all that follows. A rule holds for
//! a name, or for a part of it that ends before a dot; what follows is kept. On diffusers' side
//! `[x,y,z]` stands for several parameters, which lie below one another in the one of the author's.

use crate::checkpoint::names::canonical::Lie;

/// One rule.
#[derive(Debug, Clone)]
pub(super) struct Rule {
    /// diffusers' names: one, or those of the parts of one parameter of the author's, in their order.
    diffusers: Vec<Template>,
    original: Template,
    pub(super) lie: Lie,
}

/// One of several parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    pub index: usize,
    pub count: usize,
}

impl Rule {
    pub fn new(diffusers: &str, original: &str, lie: Lie) -> Self {
        let parts = match diffusers.split_once('[').and_then(|(before, rest)| {
            let (parts, after) = rest.split_once(']')?;
            Some((before, parts, after))
        }) {
            None => vec![Template::parse(diffusers)],
            Some((before, parts, after)) => parts
                .split(',')
                .map(|part| Template::parse(&format!("{before}{part}{after}")))
                .collect(),
        };
        Self { diffusers: parts, original: Template::parse(original), lie }
    }

    /// The author's name of what diffusers calls so, and which part of it that is.
    pub fn to_original(&self, name: &str) -> Option<(String, Slot)> {
        let count = self.diffusers.len();
        self.diffusers.iter().enumerate().find_map(|(index, template)| {
            let found = template.captures(name)?;
            Some((self.original.render(&found)?, Slot { index, count }))
        })
    }

    /// diffusers' names of what the author calls so: one, or those of its parts.
    pub fn to_diffusers(&self, name: &str) -> Option<Vec<String>> {
        let found = self.original.captures(name)?;
        self.diffusers.iter().map(|template| template.render(&found)).collect()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    Number(String),
    Segment(String),
    Rest,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Template(Vec<Piece>);

/// What the placeholders of a template stand for in a name, and what follows.
struct Captures<'a> {
    named: Vec<(&'a str, &'a str)>,
    rest: &'a str,
    tail: &'a str,
}

impl Template {
    fn parse(text: &str) -> Self {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            if !before.is_empty() {
                pieces.push(Piece::Text(before.to_owned()));
            }
            let (name, after) = after.split_once('}').unwrap_or((after, ""));
            pieces.push(match name {
                "*" => Piece::Rest,
                "a" | "b" => Piece::Segment(name.to_owned()),
                _ => Piece::Number(name.to_owned()),
            });
            rest = after;
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        Self(pieces)
    }

    fn captures<'a>(&'a self, name: &'a str) -> Option<Captures<'a>> {
        let mut found = Captures { named: Vec::new(), rest: "", tail: name };
        for piece in &self.0 {
            let (taken, length) = match piece {
                Piece::Text(text) => {
                    found.tail = found.tail.strip_prefix(text.as_str())?;
                    continue;
                }
                Piece::Number(name) => {
                    let digits = |byte: &u8| byte.is_ascii_digit();
                    (name, found.tail.bytes().take_while(|byte| digits(byte)).count())
                }
                Piece::Segment(name) => (name, found.tail.find('.').unwrap_or(found.tail.len())),
                Piece::Rest => {
                    (found.rest, found.tail) = (found.tail, "");
                    continue;
                }
            };
            if length == 0 {
                return None;
            }
            let (value, tail) = found.tail.split_at(length);
            found.named.push((taken, value));
            found.tail = tail;
        }
        (found.tail.is_empty() || found.tail.starts_with('.')).then_some(found)
    }

    fn render(&self, found: &Captures<'_>) -> Option<String> {
        let mut name = String::new();
        for piece in &self.0 {
            match piece {
                Piece::Text(text) => name.push_str(text),
                Piece::Rest => name.push_str(found.rest),
                Piece::Number(wanted) | Piece::Segment(wanted) => {
                    name.push_str(found.named.iter().find(|(known, _)| known == wanted)?.1);
                }
            }
        }
        name.push_str(found.tail);
        Some(name)
    }
}

/// The author's name of a parameter of diffusers' by the first rule that holds.
pub(super) fn to_original(rules: &[Rule], name: &str) -> Option<(String, Slot, Lie)> {
    rules.iter().find_map(|rule| {
        let (name, slot) = rule.to_original(name)?;
        Some((name, slot, rule.lie))
    })
}

/// diffusers' names of a parameter of the author's by the first rule that holds.
pub(super) fn to_diffusers(rules: &[Rule], name: &str) -> Option<(Vec<String>, Lie)> {
    rules.iter().find_map(|rule| Some((rule.to_diffusers(name)?, rule.lie)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_holds_for_a_name_or_for_what_ends_before_a_dot() {
        let rule = Rule::new("blocks.{i}.attn.[to_q,to_k]", "layers.{i}.qk", Lie::Same);
        let slot = |index| Slot { index, count: 2 };
        assert_eq!(rule.to_original("blocks.12.attn.to_k"), Some(("layers.12.qk".into(), slot(1))));
        assert_eq!(
            rule.to_original("blocks.0.attn.to_q.weight"),
            Some(("layers.0.qk.weight".into(), slot(0)))
        );
        assert_eq!(rule.to_original("blocks.0.attn.to_qx.weight"), None);
        assert_eq!(rule.to_original("blocks.x.attn.to_q"), None);
        let both = rule.to_diffusers("layers.3.qk.bias").expect("holds");
        assert_eq!(both, ["blocks.3.attn.to_q.bias", "blocks.3.attn.to_k.bias"]);
    }

    #[test]
    fn placeholders_stand_for_numbers_segments_and_the_rest() {
        let rule = Rule::new("{b}.{i}.ff.linear_{n}", "{b}.{i}.ff.w{n}", Lie::Same);
        let (name, _) = rule.to_original("layers.3.ff.linear_12.weight").expect("holds");
        assert_eq!(name, "layers.3.ff.w12.weight");
        let rest = Rule::new("time.{*}", "t.{*}", Lie::Same);
        assert_eq!(rest.to_diffusers("t.mlp.0.weight").expect("holds"), ["time.mlp.0.weight"]);
        assert_eq!(rest.to_diffusers("t"), None);
    }
}
