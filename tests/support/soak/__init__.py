"""Campaigns that go on for as long as they are let: promises tried at random moments, and counted."""
