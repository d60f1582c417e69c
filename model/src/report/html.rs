//! A trace as one self-contained page of HTML.
